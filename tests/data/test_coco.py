"""Labels drawn from a JSON of COCO's format, and what is refused of it."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from miniatures import coco, coco_content, draw_image, own_folder, run_lengths
from PIL import Image

from segheads import Predictor, create_model
from segheads.cli import main
from segheads.cli.evaluate import Config as EvaluateConfig
from segheads.cli.evaluate import main as evaluate
from segheads.data import COCODataset, DataConfig, open_dataset, scan_splits
from segheads.data.coco_json import drawn
from segheads.data.coco_json import run_lengths as decoded
from segheads.data.findings import find_problems
from segheads.data.scan import scan
from segheads.errors import DataError, DataMissingError, OptionError, PackageMissingError
from segheads.training import DEMO_RUN, TrainingConfig, run_training

WIDTH, HEIGHT = SIZE = (12, 8)
CAT, DOG = 3, 7  # ids of categories; classes 1 and 2 after background


def square(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def filled(*boxes):
    """Labels with boxes `(label, left, top, right, bottom)` painted one over the other."""
    labels = np.zeros((HEIGHT, WIDTH), int)
    for label, left, top, right, bottom in boxes:
        labels[top:bottom, left:right] = label
    return labels.tolist()


def mask(left, top, right, bottom):
    return np.array(filled((1, left, top, right, bottom))) == 1


def written(root, annotations, names=("a.png",), change=None, size=SIZE):
    """The files of one split."""
    for name in names:
        draw_image(root / "images" / name, size)
    content = coco_content(names, annotations, SIZE)
    if change is not None:
        change(content)
    (root / "a.json").write_text(json.dumps(content), encoding="utf-8")
    return root / "a.json", root / "images"


def labels(root, annotations, change=None, **options):
    return COCODataset(*written(root, annotations, change=change), **options).read(0)[1].tolist()


def compressed(region):
    pycocotools = pytest.importorskip("pycocotools.mask")
    rle = pycocotools.encode(np.asfortranarray(region.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.mark.parametrize(
    "segmentation",
    [[square(2, 1, 6, 5)], run_lengths(mask(2, 1, 6, 5)), compressed(mask(2, 1, 6, 5))],
    ids=["polygon", "runs", "compressed runs"],
)
def test_regions_and_background(tmp_path, segmentation):
    assert labels(tmp_path, [(0, CAT, segmentation)]) == filled((1, 2, 1, 6, 5))


def test_an_annotation_of_several_polygons(tmp_path):
    parts = [square(0, 0, 2, 2), square(8, 4, 12, 8)]
    assert labels(tmp_path, [(0, DOG, parts)]) == filled((2, 0, 0, 2, 2), (2, 8, 4, 12, 8))


def test_polygons_end_at_the_border(tmp_path):
    assert labels(tmp_path, [(0, DOG, [square(-3, -2, 4, 20)])]) == filled((2, 0, 0, 4, 8))


def test_pixels_without_annotation_are_ignored_where_asked_for(tmp_path):
    dataset = COCODataset(*written(tmp_path, [(0, CAT, [square(2, 1, 6, 5)])]), background="ignore")
    assert (dataset.class_names, dataset.classes.has_background) == (("cat", "dog"), False)
    expected = np.where(mask(2, 1, 6, 5), 0, 255)
    torch.testing.assert_close(dataset.read(0)[1], torch.from_numpy(expected.astype(np.uint8)))


def test_classes_are_categories_by_id(tmp_path):
    dataset = COCODataset(*written(tmp_path, [(0, CAT, [square(2, 1, 6, 5)])]))
    assert dataset.class_names == ("background", "cat", "dog")
    assert (dataset.palette[0], dataset.classes.has_background, dataset.ignore_index) == ((0, 0, 0), True, 255)


def test_a_category_called_background_is_what_is_not_annotated(tmp_path):
    def change(content):
        content["categories"].append({"id": 5, "name": "background"})

    dataset = COCODataset(*written(tmp_path, [(0, CAT, [square(0, 0, 6, 8)])], change=change))
    assert dataset.class_names == ("cat", "background", "dog")
    assert dataset.read(0)[1][0].tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("order", [1, -1])
def test_the_smaller_region_is_on_top(tmp_path, order):
    regions = [(0, CAT, [square(0, 0, 10, 8)]), (0, DOG, run_lengths(mask(2, 2, 5, 5)))][::order]
    assert labels(tmp_path, regions) == filled((1, 0, 0, 10, 8), (2, 2, 2, 5, 5))


def test_crowds_are_ignored_but_for_what_is_before_them(tmp_path):
    crowd = (0, CAT, run_lengths(mask(0, 0, 8, 8)), {"iscrowd": 1})
    table = (0, DOG, [square(0, 0, 12, 8)])
    cat = (0, CAT, [square(1, 1, 3, 3)])
    assert labels(tmp_path, [crowd, cat, table]) == filled((2, 0, 0, 12, 8), (255, 0, 0, 8, 8), (1, 1, 1, 3, 3))


def test_more_than_255_classes(tmp_path):
    def change(content):
        content["categories"] = [{"id": index, "name": f"thing {index}"} for index in range(300)]

    dataset = COCODataset(*written(tmp_path, [(0, 299, [square(0, 0, 6, 8)])], change=change), background="ignore")
    assert (dataset.num_classes, dataset.ignore_index) == (300, -1)
    assert dataset.read(0)[1][0].tolist() == [299] * 6 + [-1] * 6


def test_run_lengths_are_those_of_pycocotools():
    pycocotools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 0.99, 1):
        region = rng.random((90, 70)) < share
        region[:, 20:60] |= share == 0.01  # runs of more than 5 bits
        rle = compressed(region)
        assert (drawn(rle, (90, 70)) == region).all()
        assert drawn({"size": [90, 70], "counts": decoded(rle["counts"])}, (90, 70)).tolist() == region.tolist()
        assert pycocotools.area({"size": [90, 70], "counts": rle["counts"]}) == region.sum()


POLYGON = [square(2, 1, 6, 5)]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 4, 1, 4]], r"a polygon \(number 0\) of 5 numbers, an odd number"),
        ([*POLYGON, [1, 1, 4, 4]], r"a polygon \(number 1\) of 4 numbers; three points or more make one, so 6"),
        ([[]], r"a polygon \(number 0\) of 0 numbers"),
        ([[1, 1, 4, 1, 4, "x"]], "of 6 numbers, not all of which are finite numbers"),
        ([[1, 1, 4, 1, 4, float("nan")]], "of 6 numbers, not all of which are finite numbers"),
        ([1, 1, 4, 1, 4, 4], r"should have a list of polygons, or size and counts, as segmentation; got \[1, 1, 4"),
        ([square(20, 1, 30, 5)], r"lies outside of the image: x is 20 to 30, and the image is 12x8 \(width x height\)"),
        ([square(1, -9, 3, -2)], "lies outside of the image: y is -9 to -2"),
        ({"size": [12, 8], "counts": [96]}, r"of size \[12, 8\] \(height, width\), and its image is \[8, 12\]"),
        ({"size": [8, 12], "counts": [10, 20]}, "has run lengths of 30 pixels, and its image has 96"),
        ({"size": [8, 12], "counts": [-4, 100]}, "has a run length of -4 pixels"),
        ({"size": [8, 12], "counts": [1.5, 94.5]}, r"should have whole numbers as counts; got \[1.5, 94.5\]"),
        ({"size": [8, 12]}, "should have run lengths or their compressed text as counts; got None"),
        ("POLYGON((1 1))", r"should have a list of polygons.*got 'POLYGON"),
    ],
)
def test_a_bad_segmentation_is_named(tmp_path, segmentation, message):
    with pytest.raises(DataError, match=rf"/a\.json: annotation 101 of a\.png .*{message}"):
        labels(tmp_path, [(0, CAT, POLYGON), (0, CAT, segmentation)])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("34", "has run lengths of 7 pixels, and its image has 96"),  # what pycocotools fills with anything
        ("34Z", "has compressed run lengths that are cut off"),
        ("3 4", "has the character ' ' in its compressed run lengths"),
        ("3o", "has compressed run lengths that are cut off"),
    ],
)
def test_compressed_runs_of_another_length_are_named(tmp_path, counts, message):
    with pytest.raises(DataError, match=rf"/a\.json: annotation 100 of a\.png {message}"):
        labels(tmp_path, [(0, CAT, {"size": [8, 12], "counts": counts})])


def replace(kind, place, **values):
    def change(content):
        content[kind][place].update(values)

    return change


def without(kind, place, key):
    def change(content):
        del content[kind][place][key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("annotations", 0, category_id=4), r"annotation 100 of a\.png is of category 4; the ids .* are 3, 7"),
        (replace("annotations", 0, image_id=99), r"annotation 100 is of image 99, an id that no image has"),
        (replace("annotations", 0, iscrowd=2), r"annotation 100 of a\.png has iscrowd 2; it should be 0 or 1"),
        (replace("categories", 1, id=7), r"categories\[1\], 'cat' of id 7, has the id or the name of another"),
        (replace("categories", 1, name="dog"), r"categories\[1\], 'dog' of id 3, has the id or the name of another"),
        (replace("categories", 1, id="3"), r"categories\[1\] should have a whole number as id and a name"),
        (replace("images", 1, id=10), r"images a\.png and b\.png have the same id 10"),
        (replace("images", 1, file_name="a.png"), r"lists the image a\.png twice"),
        (replace("images", 1, width=None), r"image b\.png should have height and width in pixels; .*width None"),
        (replace("images", 1, width=float("nan")), r"image b\.png should have height and width in pixels; .*width nan"),
        (without("images", 1, "height"), r"images\[1\] \(id 11\) lacks height"),
        (without("annotations", 0, "category_id"), r"annotations\[0\] \(id 100\) lacks category_id"),
        (lambda content: content.update(images=[]), r"images should be a list of one or more; got \[\]"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, change, message):
    files = written(tmp_path, [(0, CAT, POLYGON), (1, DOG, POLYGON)], ("a.png", "b.png"), change)
    with pytest.raises(DataError, match=rf"/a\.json:? {message}"):
        COCODataset(*files)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: .* it should be annotations in COCO's format"),
        ("[]", r"lacks images and categories and annotations; it has no keys \(list\)"),
        ('{"images": [], "info": 1}', "lacks categories and annotations; it has the keys images, info"),
    ],
)
def test_what_is_no_coco_json_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"/a\.json .*{message}"):
        COCODataset(tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize("box", [None, []])
def test_boxes_are_refused(tmp_path, box):
    with pytest.raises(DataError, match=r"1 of 2 annotations in .*a\.json have no segmentation.*: annotation 101 of a"):
        labels(tmp_path, [(0, CAT, POLYGON), (0, DOG, box, {"bbox": [1, 1, 4, 4]})])


def test_shares_of_the_size_are_refused(tmp_path):
    with pytest.raises(DataError, match="no coordinate of its polygons is above 1, so they seem to be shares"):
        labels(tmp_path, [(0, CAT, [square(0.1, 0.1, 0.5, 0.9)]), (0, DOG, [square(0.5, 0.1, 1, 0.9)])])


def test_an_image_of_another_size_is_named_with_both(tmp_path):
    dataset = COCODataset(*written(tmp_path, [(0, CAT, POLYGON)], size=(24, 16)))
    with pytest.raises(DataError, match=r"image .*/a\.png is 24x16, but .*/a\.json says 12x8 \(width x height\)"):
        dataset.read(0)


def test_missing_images_are_named(tmp_path):
    files = written(tmp_path, [(0, CAT, POLYGON)], ("a.png", "b.png"))
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataMissingError, match=r"1 of 2 images that .*a\.json lists are not in .*/images: b\.png"):
        COCODataset(*files)


def test_two_images_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"lists both a\.jpg and a\.png; keep one file per name"):
        COCODataset(*written(tmp_path, [(0, CAT, POLYGON)], ("a.jpg", "a.png")))


def test_names_in_sub_folders_of_any_unicode_form(tmp_path):
    files = written(tmp_path, [(0, CAT, POLYGON), (1, CAT, POLYGON)], ("sub/e\u0301.png", "a.png"))
    content = json.loads(files[0].read_text())
    content["images"][0]["file_name"] = "sub\\\u00e9.png"
    files[0].write_text(json.dumps(content))
    dataset = COCODataset(*files)
    assert [dataset.name(index) for index in range(2)] == ["a", "sub\\\u00e9"]
    assert dataset.read(1)[1].max() == 1


def test_images_without_annotations_and_files_that_are_not_listed_are_told(tmp_path, caplog):
    files = written(tmp_path, [(0, CAT, POLYGON)], ("a.png", "b.png"))
    draw_image(tmp_path / "images" / "c.png")
    dataset = COCODataset(*files)
    assert f"1 of 2 images in {files[0]} have no annotation, and are all background: b.png" in caplog.text
    assert f"1 image files in {files[1]} are passed over, since a.json does not list them: c.png" in caplog.text
    assert not dataset.read(1)[1].any()
    COCODataset(*files, background="ignore")
    assert "have no annotation, and are all ignored: b.png" in caplog.text


def save_turned(path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 9, 9)).save(path, exif=exif)


def test_exif_goes_by_the_size_in_the_json(tmp_path):
    files = written(tmp_path, [(0, CAT, POLYGON)], ("a.jpg",))
    save_turned(files[1] / "a.jpg", (HEIGHT, WIDTH), 6)
    image, drawn_labels = COCODataset(*files).read(0)
    assert (image.size, tuple(drawn_labels.shape)) == (SIZE, (HEIGHT, WIDTH))
    save_turned(files[1] / "a.jpg", SIZE, 3)
    with pytest.raises(DataError, match=r"a\.jpg has the EXIF orientation 3, and its label fits both"):
        COCODataset(*files).read(0)


def test_exif_is_an_option(tmp_path):
    coco(tmp_path)
    dataset = open_dataset(DataConfig(dataset="coco", data_root=str(tmp_path), exif="ignore"), "val")
    assert dataset.image_form.exif == "ignore"


def move(root, moves):
    for split, (annotations, images) in moves.items():
        (root / annotations).parent.mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").rename(root / annotations)
        if images != f"{split}2017":
            (root / images).parent.mkdir(parents=True, exist_ok=True)
            for path in (root / f"{split}2017").iterdir():
                (root / images).mkdir(parents=True, exist_ok=True)
                path.rename(root / images / path.name)
            (root / f"{split}2017").rmdir()


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_layouts(tmp_path, annotations, images):
    coco(tmp_path)
    val = "valid" if "_annotations" in annotations else "val"
    names = {"train": "train", "val": val}
    move(tmp_path, {split: (annotations.format(name), images.format(name)) for split, name in names.items()})
    for split, stem in (("train", "a_000000_000019"), ("val", "c_000000_000001")):
        dataset = open_dataset(DataConfig(dataset="coco", data_root=tmp_path), split)
        assert (len(dataset), dataset.name(0), dataset.read(0)[1][0, :3].tolist()) == (2, stem, [0, 1, 2])


def test_two_candidates_are_refused(tmp_path):
    coco(tmp_path)
    config = DataConfig(dataset="coco", data_root=tmp_path)
    (tmp_path / "images/val2017").mkdir(parents=True)
    with pytest.raises(DataError, match=r"more than one folder of images .*: val2017 and images/val2017; leave one"):
        open_dataset(config, "val")
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid/_annotations.coco.json").write_text("{}")
    both = r"annotations/instances_val2017\.json and valid/_annotations\.coco\.json"
    with pytest.raises(DataError, match=rf"more than one annotation file of val: {both}"):
        open_dataset(config, "val")


def test_none_is_an_error_that_lists_the_places(tmp_path):
    config = DataConfig(dataset="coco", data_root=tmp_path)
    places = r"annotations/instances_val2017\.json, .*annotations/val\.json, val/_annotations\.coco\.json, .*valid/_ann"
    with pytest.raises(DataMissingError, match=rf"there is no annotation file of val in .*; looked for {places}"):
        open_dataset(config, "val")
    coco(tmp_path)
    for path in (tmp_path / "val2017").iterdir():
        path.unlink()
    (tmp_path / "val2017").rmdir()
    with pytest.raises(DataMissingError, match=r"no folder of images .*looked for val2017, images/val2017, images"):
        open_dataset(config, "val")


def test_pycocotools_missing_is_one_line(tmp_path, monkeypatch):
    files = written(tmp_path, [(0, CAT, POLYGON)])
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(PackageMissingError, match=r"need pycocotools, .*: pip install 'segheads\[coco\]'"):
        COCODataset(*files)


def test_background_is_class_or_ignore(tmp_path):
    with pytest.raises(ValueError, match="background must be 'class' or 'ignore'; got 'x'"):
        COCODataset(tmp_path, tmp_path, background="x")
    own_folder(tmp_path)
    with pytest.raises(OptionError, match="dataset folder takes no background; .*background is for coco"):
        open_dataset(DataConfig(dataset="folder", data_root=tmp_path, num_classes=2, background="ignore"), "val")


def test_the_scan_looks_at_what_is_drawn_and_remembers_it(tmp_path, monkeypatch):
    coco(tmp_path / "own", (0, 1, 2, 2))
    opened = [COCODataset.open(DataConfig(data_root=tmp_path / "own"), split) for split in ("train", "val")]
    found = scan(opened[0], cache=tmp_path / "cache")
    assert (found.samples, found.pixels, found.ignored) == (2, (960, 960, 1920), 0)
    assert (found.images, found.label_kinds, found.values) == ((2, 2, 2), {}, {})
    seen, read = [], COCODataset.read
    monkeypatch.setattr(COCODataset, "read", lambda self, index: (seen.append(index), read(self, index))[1])
    assert scan(opened[0], cache=tmp_path / "cache") == found
    assert not seen
    path = tmp_path / "own/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:2]
    path.write_text(json.dumps(content))
    again = COCODataset.open(DataConfig(data_root=tmp_path / "own"), "train")
    assert scan(again, cache=tmp_path / "cache").pixels == (2400, 480, 960)
    assert seen == [0, 1]


def test_the_scan_names_each_image_that_is_wrong(tmp_path):
    coco(tmp_path)
    for name in ("c", "d"):
        draw_image(tmp_path / f"val2017/{name}_000000_000001.jpg", (20, 20))
    sets = {split: COCODataset.open(DataConfig(data_root=tmp_path), split) for split in ("train", "val")}
    found = scan_splits(sets)
    assert len(found.splits["val"].problems["size"]) == 2
    (finding,) = [finding for finding in find_problems(found) if finding.severity == "error"]
    assert re.search(r"val: image .*/c_.*jpg is 20x20, but .*json says 48x40.*same is so of .*/d_", finding.message)


def test_the_scan_names_images_without_a_labelled_pixel(tmp_path):
    files = written(tmp_path, [(0, CAT, POLYGON)], ("a.png", "b.png"))
    found = scan(COCODataset(*files, background="ignore"))
    assert found.unlabelled == [str(tmp_path / "images" / "b.png")]
    assert not found.lossy


def test_splits_of_other_categories_are_refused(tmp_path, capsys):
    coco(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    first, second = copy.deepcopy(content["categories"])
    first["name"], second["name"] = second["name"], first["name"]
    path.write_text(json.dumps({**content, "categories": [first, second]}))
    words = ["--dataset", "coco", "--data-root", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main(["check-data", *words])
    assert "train and val have other classes: 3 and 3, and class 1 is cat in train and dog in val" in (
        capsys.readouterr().err
    )


@pytest.fixture
def _one_run():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.usefixtures("_one_run")
def test_from_the_json_to_a_prediction(tmp_path):
    root, run = coco(tmp_path / "own"), tmp_path / "run"
    small = {"backbone": "test_vit", "head": "linear", "loss_reduction": "valid", "power": 1.0, "scale": (48, 40)}
    small |= {"crop_size": 32, "window": 32, "stride": 16, "iterations": 2, "batch_size": 2, "tracker": "none"}
    data = {"dataset": "coco", "data_root": root, "output": run, "pictures": 1, "threads": 1}
    run_training(
        TrainingConfig.from_flat(**{**DEMO_RUN, **small, **data}),
        lambda config, count: create_model(config.model.backbone, "linear", count, **config.model_options(count)),
    )
    results = evaluate(EvaluateConfig(model=str(run), workers=0, threads=1, pictures=1))
    assert results["pixels"].tolist() == [2 * 640] * 3
    predictor = Predictor.from_pretrained(run)
    assert predictor.classes.names == ("background", "cat", "dog")
    assert predictor.classes.has_background
    assert predictor(root / "val2017/c_000000_000001.jpg").labels.shape == (40, 48)
