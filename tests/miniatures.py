"""Data sets of a few pixels, drawn in the folders of the real ones; both splits, two images each."""

import json

import numpy as np
from PIL import Image

SIZE = (48, 40)  # width x height
STEMS = {"train": ("b_000001_000019", "a_000000_000019"), "val": ("d_000000_000001", "c_000000_000001")}


def draw_image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path)


def label_map(values, size=SIZE, dtype=np.uint8):
    """The values side by side, again and again, from the left edge on."""
    return np.tile(np.resize(np.array(values, dtype), size[0]), (size[1], 1))


def draw_labels(path, values, size=SIZE, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label_map(values, size, dtype)).save(path)


def ade20k(root, values=(0, 1, 150)):
    for split, folder in (("train", "training"), ("val", "validation")):
        for stem in STEMS[split]:
            draw_image(root / "images" / folder / f"{stem}.jpg")
            draw_labels(root / "annotations" / folder / f"{stem}.png", values)
    return root


def camvid(root, values=(0, 10, 11)):
    for split, stems in STEMS.items():
        for stem in stems:
            draw_image(root / split / f"{stem}.png")
            draw_labels(root / f"{split}annot" / f"{stem}.png", values)
    return root


def cityscapes(root, values=(0, 7, 33), kind="labelIds"):
    for split, stems in STEMS.items():
        for stem in stems:
            place = f"{split}/{stem[0]}/{stem}"
            draw_image(root / f"leftImg8bit/{place}_leftImg8bit.png")
            draw_labels(root / f"gtFine/{place}_gtFine_{kind}.png", values)
    return root


def pascal_context(root, values=(0, 1, 59)):
    base = root / "VOCdevkit" / "VOC2010"
    lists = base / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    for split, stems in STEMS.items():
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            draw_image(base / "JPEGImages" / f"{stem}.jpg")
            draw_labels(base / "SegmentationClassContext" / f"{stem}.png", values)
    return root


def coco_stuff(root, savemat, values=(0, 1, 182), **more):
    """As released; `savemat` is SciPy's."""
    (root / "imageLists").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split, stems in (("train", STEMS["train"]), ("test", STEMS["val"])):
        (root / "imageLists" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            draw_image(root / "images" / f"{stem}.jpg")
            savemat(root / "annotations" / f"{stem}.mat", {"S": label_map(values), **more}, do_compression=True)
    return root


def converted_coco_stuff(root, values=(0, 1, 171)):
    for folder, stems in (("train2014", STEMS["train"]), ("test2014", STEMS["val"])):
        for stem in stems:
            draw_image(root / "images" / folder / f"{stem}.jpg")
            draw_labels(root / "annotations" / folder / f"{stem}_labelTrainIds.png", values)
    return root


def coco_stuff_164k(root, values=(0, 181, 255), end=""):
    for split, stems in STEMS.items():
        for stem in stems:
            draw_image(root / f"{split}2017" / f"{stem}.jpg")
            draw_labels(root / f"stuffthingmaps_trainval2017/{split}2017/{stem}{end}.png", values)
    return root


def voc2012(root, values=(0, 20, 255), labels="SegmentationClass", lists=("train", "val")):
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for name, stems in zip(lists, STEMS.values(), strict=True):
        (base / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            draw_image(base / "JPEGImages" / f"{stem}.jpg")
            draw_labels(base / labels / f"{stem}.png", values)
    return root


def voc2012_aug(root):
    voc2012(root, labels="SegmentationClassAug", lists=("train_aug", "unused"))
    return voc2012(root)


def own_folder(root, values=(0, 1, 255)):
    for split, stems in STEMS.items():
        for stem in stems:
            draw_image(root / "images" / split / f"{stem}.jpg")
            draw_labels(root / "labels" / split / f"{stem}.png", values)
    return root


def run_lengths(mask):
    """The uncompressed RLE of a mask."""
    flat = np.concatenate([[0], np.asarray(mask).T.ravel(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [flat.size - 2]]))
    return {"size": [len(mask), len(mask[0])], "counts": counts.tolist()}


def coco_content(names, annotations, size=SIZE, categories=((7, "dog"), (3, "cat"))):
    """A JSON of COCO's format; of each annotation the image's place, the category's id, and the segmentation."""
    return {
        "images": [
            {"id": 10 + i, "file_name": name, "width": size[0], "height": size[1]} for i, name in enumerate(names)
        ],
        "categories": [{"id": index, "name": name} for index, name in categories],
        "annotations": [
            {"id": 100 + i, "image_id": 10 + place, "category_id": category, "segmentation": segmentation, **more}
            for i, (place, category, segmentation, *rest) in enumerate(annotations)
            for more in [rest[0] if rest else {}]
        ],
    }


def coco(root, values=(0, 1, 2)):
    """As released; value 0 is not annotated."""
    (root / "annotations").mkdir(parents=True)
    for split, stems in STEMS.items():
        for stem in stems:
            draw_image(root / f"{split}2017" / f"{stem}.jpg")
        masks = {index: label_map(values) == value for index, value in ((3, 1), (7, 2)) if value in values}
        annotations = [(place, index, run_lengths(mask)) for place in (0, 1) for index, mask in masks.items()]
        content = coco_content([f"{stem}.jpg" for stem in stems], annotations)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


LAYOUTS = {
    "ade20k": ade20k,
    "camvid": camvid,
    "cityscapes": cityscapes,
    "coco": coco,
    "coco_stuff_10k": converted_coco_stuff,
    "coco_stuff_164k": coco_stuff_164k,
    "pascal_context": pascal_context,
    "voc2012": voc2012,
    "voc2012_aug": voc2012_aug,
}
"""What draws each data set by its name; one that is not here is drawn as `own_folder`."""
