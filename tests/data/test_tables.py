"""Images and labels that a .csv or .parquet names."""

import csv
import re
from pathlib import Path

import pytest
from miniatures import draw_image, draw_labels

from segheads import Predictor, create_model
from segheads.cli.evaluate import Config as EvaluateConfig
from segheads.cli.evaluate import main as evaluate
from segheads.data import DataConfig, LabelMap, open_dataset
from segheads.data.tables import table_pairs
from segheads.errors import DataError, DataMissingError, OptionError, PackageMissingError
from segheads.training import DEMO_RUN, TrainingConfig, run_training

ROWS = [
    {"id": 7, "image": "photos/b.jpg", "label": "masks/1.png", "split": "train"},
    {"id": 8, "image": "photos/a, b.jpg", "label": "masks/2.png", "split": "train"},
    {"id": 9, "image": "photos/ü c.jpg", "label": "masks/3.png", "split": "valid"},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def root(tmp_path):
    for number, row in enumerate(ROWS, 1):
        draw_image(tmp_path / row["image"])
        draw_labels(tmp_path / f"masks/{number}.png", (0, 1, 255))
    return tmp_path


def opened(root, split, **options):
    return open_dataset(DataConfig(dataset="folder", data_root=root, class_names=("a", "b"), **options), split)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_one_table(root, ending):
    table = write(root / f"data{ending}", ROWS)
    train, val = (opened(table, split) for split in ("train", "val"))
    assert [train.name(index) for index in range(len(train))] == ["a, b", "b"]
    assert [label.name for _, label in train.files] == ["2.png", "1.png"]
    assert [image.name for image, _ in val.files] == ["ü c.jpg"]
    assert train.read(0)[1][0, :3].tolist() == [0, 1, 255]
    with pytest.raises(DataError, match="no row whose split is test; there are train, valid$"):
        table_pairs(table, "test")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_two_tables(root, ending):
    rows = [{"label": row["label"], "image": str(root / row["image"])} for row in ROWS]
    write(root / f"train{ending}", rows[:2]), write(root / f"val{ending}", rows[2:])
    assert [len(opened(root, split)) for split in ("train", "val")] == [2, 1]
    assert opened(root, "val", label_values=(1, 0), ignore_index=255).read(0)[1][0, :3].tolist() == [1, 0, 255]


def test_as_spreadsheets_write_them(root):
    lines = ["\ufeffimage , label", *(f'"{row["image"]}",{row["label"]}'.replace("/", "\\") for row in ROWS)]
    (root / "train.csv").write_bytes("\r\n".join(lines).encode())
    assert len(opened(root, "train")) == 3


def test_a_table_does_not_win_over_folders(root):
    write(root / "train.csv", ROWS)
    draw_image(root / "images/train/x.jpg")
    draw_labels(root / "labels/train/x.png", (0,))
    assert [image.name for image, _ in opened(root, "train").files] == ["x.jpg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "photos/none.jpg"}, r"^1 files of .*data\.csv are not there: photos/none\.jpg \(image of row 1\)"),
        (
            {"label": "masks/none.png"},
            r"^1 files of .* not there: masks/none\.png \(label of row 1\); paths count from",
        ),
        ({"label": ""}, r"data\.csv has no label in row 1; fill it in"),
        ({"image": "photos/a, b.jpg"}, r"has photos/a, b\.jpg in row 2, and before in row 1; keep one"),
        ({"image": "photos"}, "photos is a folder, but should be an image file"),
    ],
)
def test_wrong_rows_are_named(root, change, message):
    table = write(root / "data.csv", [{**ROWS[0], **change}, *ROWS[1:]])
    with pytest.raises((DataError, DataMissingError), match=message):
        opened(table, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image|label\na|b\n", r"data\.csv has no column image and no column label; its columns are image\|label$"),
        ("image,mask,split\na,b,train\n", r"data\.csv has no column label; its columns are image, mask, split"),
        (
            "image,label\na,b\n",
            r"has no column split, so it does not tell train from the rest; .*train\.csv and val\.csv",
        ),
        ("image,label,split\n", r"data\.csv has no rows; it should have the columns image and label"),
        ("", r"data\.csv has no rows"),
        ("image,label,split\na.jpg,b.png\n", r"row 1 of .*data\.csv has not the 3 values of the others"),
        ("image,label\na,b,c,d\n", r"row 1 of .* has not the 2 values"),
        ('image,label\n"a,b\n', r"data\.csv cannot be read as CSV: unexpected end of data in line"),
        (b"image,label\n\xff,b\n", r"data\.csv is no text in UTF-8"),
    ],
)
def test_wrong_tables_are_named(root, text, message):
    table = root / "data.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        opened(table, "train")


def test_wrong_parquet(root, monkeypatch):
    table = root / "data.parquet"
    table.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"data\.parquet cannot be read as Parquet: "):
        opened(table, "train")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(PackageMissingError, match=r'data\.parquet needs pyarrow: pip install "segheads\[parquet\]"'):
        opened(table, "train")


def test_what_does_not_go_together(root):
    write(root / "train.csv", ROWS)
    with pytest.raises(OptionError, match=r"train\.csv has whole names of files; leave out label_suffix$"):
        opened(root, "train", label_suffix="_mask")
    write(root / "train.parquet", ROWS)
    with pytest.raises(DataError, match=r"train\.csv and .*train\.parquet are both there; keep one"):
        opened(root, "train")
    with pytest.raises(DataMissingError, match="there is no folder .*, and no table val.csv or val.parquet"):
        opened(root, "val")
    with pytest.raises(DataMissingError, match=re.escape(str(root / "gone.csv"))):
        opened(root / "gone.csv", "train")


def test_rows_of_no_known_split_are_counted(root, caplog):
    rows = [{**row, "split": split} for row, split in zip(ROWS, ("Train", "trian", "VAL"), strict=True)]
    table = write(root / "data.csv", rows)
    assert [len(opened(table, split)) for split in ("train", "val")] == [1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"rows passed over in {table}, by their split: trian (1)"
    ] * 2


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_separators_and_upper_case(root, mark):
    text = f"Label{mark}Image\nmasks/1.png{mark}photos/b.jpg\n"
    (root / "val.csv").write_text(text)
    assert [label.name for _, label in opened(root, "val").files] == ["1.png"]


def test_columns_that_stand_twice(root):
    (root / "val.csv").write_text("image,label,Label\nphotos/b.jpg,masks/1.png,masks/2.png\n")
    with pytest.raises(DataError, match=r"val\.csv has 2 columns label; keep one$"):
        opened(root, "val")


def test_relative_and_absolute_paths(root, monkeypatch):
    write(root / "val.csv", [{**ROWS[0], "image": str(root / ROWS[0]["image"]), "split": "val"}, ROWS[2]])
    monkeypatch.chdir(root.parent)
    dataset = opened(Path(root.name), "val")
    assert sorted(dataset.name(index) for index in range(2)) == ["b", "ü c"]


def test_parquet_of_what_is_no_path(root):
    write(root / "val.parquet", [{**ROWS[0], "image": b"\x89PNG" * 1000, "split": "val"}])
    with pytest.raises(DataError, match=r"val\.parquet holds bytes in its column image, but it should hold paths of"):
        opened(root, "val")
    write(root / "val.csv", [{**ROWS[0], "image": "x" * 5000, "split": "val"}])
    (root / "val.parquet").unlink()
    with pytest.raises(DataMissingError, match=r"^1 files of .* are not there: \[\.\.\.\] \(image of row 1\)"):
        opened(root, "val")


def test_what_is_not_read_is_named(root, caplog):
    write(root / "val.csv", ROWS)
    (root / "val.txt").write_text("x\n")
    assert len(opened(root, "val")) == 1
    draw_image(root / "images/val/x.jpg")
    draw_labels(root / "labels/val/x.png", (0,))
    assert len(opened(root, "val")) == 1
    names, folder = (root / "val.csv", root / "val.txt"), root / "images/val"
    assert [record.getMessage() for record in caplog.records] == [
        f"{names[1]} is not read: {names[0]} tells the images of val",
        *(f"{name} is not read: {folder} tells the images of val" for name in names),
    ]


def test_from_the_table_to_a_prediction(root, own_run):
    """The labels are 7 and 9 in the files, and no names pair them with images."""
    for number in (1, 2, 3):
        draw_labels(root / f"masks/{number}.png", (7, 9, 255))
    table, run = write(root / "data.csv", ROWS), root / "run"
    small = {"backbone": "test_vit", "head": "linear", "loss_reduction": "valid", "power": 1.0, "scale": (48, 40)}
    small |= {"crop_size": 32, "window": 32, "stride": 16, "iterations": 2, "batch_size": 2, "tracker": "none"}
    data = {"dataset": "folder", "data_root": table, "class_names": ("a", "b"), "label_values": (7, 9)}
    data |= {"ignore_index": 255, "output": run, "pictures": 0, "threads": 1}
    run_training(
        TrainingConfig.from_flat(**{**DEMO_RUN, **small, **data}),
        lambda config, count: create_model(config.model.backbone, "linear", count, **config.model_options(count)),
    )
    results = evaluate(EvaluateConfig(model=str(run), workers=0, threads=1, pictures=0))
    assert results["pixels"].tolist() == [640, 640]
    predictor = Predictor.from_pretrained(run)
    assert predictor.classes.names == ("a", "b")
    assert predictor.model.label_map == LabelMap({7: 0, 9: 1, 255: None})
    assert predictor(root / ROWS[0]["image"]).labels.shape == (40, 48)
