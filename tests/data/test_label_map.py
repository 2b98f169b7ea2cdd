"""Values and colours of label files to classes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from segheads.data import DataConfig, FolderDataset, LabelMap, open_dataset
from segheads.errors import DataMissingError, LabelError, OptionError

NAMES = ("background", "lesion")


def own(root, labels, name="a.png", **options):
    """A folder of one image in either split."""
    for kind, picture in (("images", Image.new("RGB", labels.shape[1::-1])), ("labels", Image.fromarray(labels))):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            picture.save(root / kind / split / name)
    return DataConfig(dataset="folder", data_root=root, **options)


def classes(config):
    return open_dataset(config, "train").read(0)[1].tolist()


def written(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


MASKS = np.array([[0, 255, 255, 7]], np.uint8)


def test_masks_of_0_and_255(tmp_path):
    config = own(tmp_path, MASKS[:, :3], class_names=NAMES, label_values=(0, 255))
    assert classes(config) == [[0, 1, 1]]
    assert open_dataset(own(tmp_path, MASKS[:, :3], label_values=(255, 0)), "val").class_names == ("class 0", "class 1")
    assert classes(own(tmp_path, MASKS[:, :3], label_values=(255, 0))) == [[1, 0, 0]]


@pytest.mark.parametrize("ignored", [7, (7, 9)])
def test_what_is_not_named_is_an_error_unless_it_is_ignored(tmp_path, ignored):
    options = {"class_names": NAMES, "label_values": (0, 255)}
    message = r"a\.png holds 7 \(1 pixels\), but the label map names only 0, 255; name what is missing, or ignore it"
    with pytest.raises(LabelError, match=message):
        classes(own(tmp_path, MASKS, **options))
    assert classes(own(tmp_path, MASKS, ignore_index=ignored, **options)) == [[0, 1, 1, 255]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("target", ["ignore", None])
def test_a_file_of_values(tmp_path, dtype, target):
    path = written(tmp_path / "map.json", {"0": "background", "255": 1, "7": target, "9": "lesion"})
    values = np.array([[0, 255, 7, 9]], dtype)
    assert classes(own(tmp_path, values, name="a.tif", class_names=NAMES, label_map=path)) == [[0, 1, 255, 1]]


@pytest.mark.parametrize("red", ["#ff0000", "#FF0000", "[255, 0, 0]", "255,0,0"])
def test_a_file_of_colours(tmp_path, red):
    path = written(tmp_path / "map.json", {red: "lesion", "#000000": 0, "#ffffff": "ignore"})
    colours = np.array([[[0, 0, 0], [255, 0, 0], [255, 255, 255]]], np.uint8)
    assert classes(own(tmp_path, colours, class_names=NAMES, label_colours=path)) == [[0, 1, 255]]
    colours[0, 0] = 254, 0, 1
    with pytest.raises(LabelError, match=r"a\.png holds #fe0001 \(1 pixels\), but the label map names only #ff0000, "):
        classes(own(tmp_path, colours, class_names=NAMES, label_colours=path))


def test_colours_of_a_palette(tmp_path):
    path = written(tmp_path / "map.json", {"#800000": "lesion", "#000000": "background"})
    config = own(tmp_path, np.zeros((1, 2), np.uint8), class_names=NAMES, label_colours=path)
    indexed = Image.fromarray(np.array([[3, 0]], np.uint8))
    indexed.putpalette([0, 0, 0, 9, 9, 9, 9, 9, 9, 128, 0, 0])
    indexed.save(tmp_path / "labels/train/a.png")
    assert classes(config) == [[1, 0]]


def test_many_unknown_values_are_cut_short():
    with pytest.raises(LabelError, match=r"holds 1, 2, 3, 4, 5 and 4 more \(9 pixels\)"):
        LabelMap({0: 0}).to_classes(np.arange(10, dtype=np.uint8)[None], 2, path="a.png")


def test_values_of_a_map_that_the_files_type_cannot_hold():
    label_map = LabelMap({0: 0, 300: 1, -1: None})
    assert label_map.to_classes(np.array([[0, 0]], np.uint8), 2, path="a.png").tolist() == [[0, 0]]
    assert label_map.to_classes(np.array([[0, -1, 300]], np.int32), 2, path="a.png").tolist() == [[0, 255, 1]]
    with pytest.raises(LabelError, match="holds 44 "):  # 300 - 256
        label_map.to_classes(np.array([[44]], np.uint8), 2, path="a.png")


def test_more_than_255_classes():
    label_map = LabelMap({**{2 * k: k for k in range(300)}, 1: None})
    found = label_map.to_classes(np.array([[0, 510, 598, 1]], np.uint16), 300, path="a.png")
    np.testing.assert_array_equal(found, np.array([[0, 255, 299, -1]], np.int16), strict=True)


@pytest.mark.parametrize("label_map", [LabelMap({0: 0, 255: 1, 7: None}), LabelMap({(255, 0, 0): 0, (0, 0, 9): None})])
def test_json_there_and_back(label_map):
    assert LabelMap.from_json(json.loads(json.dumps(label_map.as_json()))) == label_map


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"0": "grass"}, "0 is 'grass', but the classes are background, lesion, or ignore"),
        ({"x": 0}, '\'x\' is neither a value such as "7" nor a colour such as "#ff0000"'),
        ({"0": 0, "00": 1}, "the label map names 0 twice"),
        ('{"0": 0, "0": 1}', "it names 0 twice"),
        ({"0": True}, '0 must be a class index, a name or "ignore"; got True'),
        ({"0": -1}, "a class is 0 or more, or None for ignored; got -1 for 0"),
        ({"0": 2}, "the label map gives 0 class 2, but 2 classes are 0 to 1"),
        ({"0": 0, "#ff0000": 1}, "a label map has values or colours, not both"),
        ({"[256, 0, 0]": 0}, "a colour is three numbers from 0 to 255; got (256, 0, 0)"),
        ({"#ff0000": 0}, "it names colours, which label_colours takes"),
        ({}, "a label map needs one value or colour, or more; got none"),
        ([0, 1], 'it should hold {"value": class, ...}, not a list'),
        ("{0: 1}", "Expecting property name enclosed in double quotes"),
    ],
)
def test_files_that_are_no_label_map(tmp_path, values, message):
    path = written(tmp_path / "map.json", values)
    config = own(tmp_path, MASKS, class_names=NAMES, label_map=path)
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        open_dataset(config, "train")
    assert str(path) in str(caught.value) or "classes are 0 to 1" in message


def test_a_class_that_is_called_ignore():
    with pytest.raises(ValueError, match='0 is "ignore", which is a class here; give its index, or null for no class'):
        LabelMap.from_json({"0": "ignore"}, ("ignore", "grass"))
    with pytest.raises(ValueError, match="0 is 'grass', but classes have no names here, so give indices"):
        LabelMap.from_json({"0": "grass"})


def test_a_map_that_is_not_there_or_of_the_other_kind(tmp_path):
    config = own(tmp_path, MASKS, class_names=NAMES, label_map=tmp_path / "no.json")
    with pytest.raises(DataMissingError, match=r"there is no .*no\.json, which should be a JSON file of a label map"):
        open_dataset(config, "train")
    path = written(tmp_path / "map.json", {"0": 0})
    with pytest.raises(OptionError, match="it names values, which label_map takes"):
        open_dataset(own(tmp_path, MASKS, class_names=NAMES, label_colours=path), "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_values": (0, 1, 2)}, "label_values has 3 values for 2 classes"),
        ({"label_values": (0, 0)}, "label_values names 0 twice"),
        ({"label_values": (0, 1), "label_map": "map.json"}, "label_values and label_map say the same thing"),
        (
            {"label_values": (0, 255), "ignore_index": 255},
            "ignore_index 255 is class 1 in the label map",
        ),
        (
            {"label_values": (1, 2), "reduce_zero_label": True},
            "reduce_zero_label and a label map both say",
        ),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        open_dataset(own(tmp_path, MASKS, class_names=NAMES, **options), "train")


def test_a_colour_is_ignored_in_the_map_alone(tmp_path):
    own(tmp_path, MASKS)
    folders = (tmp_path / "images/train", tmp_path / "labels/train")
    with pytest.raises(ValueError, match="ignore_index names values, and label_colours colours"):
        FolderDataset(*folders, 2, ignore_index=255, label_map=LabelMap({(0, 0, 0): 0}))


# ---------------------------------------------------------------- ignored values without a map


FOUR = ("background", "grass", "path", "house")
IN_A_ROW = np.array([[0, 1, 2, 3]], np.uint8)


def test_an_ignored_value_has_no_name(tmp_path):
    """The names would move by one: which of the four is the value 1 cannot be told."""
    message = (
        r"^4 names, 3 classes: ignore_index 0 is the value of class 'background'; leave that name out and give the "
        r"values of the others, label_values \(1, 2, 3\), or reduce_zero_label if the first name is of value 1$"
    )
    with pytest.raises(OptionError, match=message):
        open_dataset(own(tmp_path, IN_A_ROW, class_names=FOUR, ignore_index=0), "train")
    folders = (tmp_path / "images/train", tmp_path / "labels/train")
    with pytest.raises(ValueError, match=message):
        FolderDataset(*folders, 4, class_names=FOUR, ignore_index=0)
    with pytest.raises(ValueError, match=r"5 names, 4 classes: ignore_index 3 .* class 'class 3'.*\(0, 1, 2, ...\)$"):
        FolderDataset(*folders, 5, ignore_index=3)


@pytest.mark.parametrize(
    "options",
    [{"reduce_zero_label": True}, {"label_values": (1, 2, 3), "ignore_index": 0}],
    ids=["reduced", "values"],
)
def test_zero_for_no_class(tmp_path, options):
    config = own(tmp_path, IN_A_ROW, class_names=FOUR[1:], **options)
    assert classes(config) == [[255, 0, 1, 2]]


@pytest.mark.parametrize(("ignored", "values"), [(None, [0, 1, 255]), (38, [0, 1, 38]), ((38, 255), [38, 1, 255])])
def test_several_ignored_values(tmp_path, ignored, values):
    config = own(tmp_path, np.array([values], np.uint8), class_names=NAMES, ignore_index=ignored)
    assert classes(config) == [[255 if value > 1 else value for value in values]]


def test_a_value_that_no_file_has_ignores_nothing(tmp_path):
    config = own(tmp_path, np.array([[0, 1, 255]], np.uint8), class_names=NAMES, ignore_index=-1)
    with pytest.raises(LabelError, match="holds the value 255 .* allow 0 to 1, and -1 for ignored"):
        classes(config)


def test_the_255th_class_is_not_ignored_by_default(tmp_path):
    own(tmp_path, np.array([[0, 1, 255]], np.uint8))
    dataset = FolderDataset(tmp_path / "images/train", tmp_path / "labels/train", 255, reduce_zero_label=True)
    assert dataset.read(0)[1].tolist() == [[255, 0, 254]]


def test_one_ignored_value_is_said_in_one_way():
    assert DataConfig(ignore_index=(7,)) == DataConfig(ignore_index=7)
    assert DataConfig.from_json({"ignore_index": [7, 8]}).ignore_index == (7, 8)


def test_what_0_meant_in_an_older_configuration():
    """0.1.0 knew `ignore_index` 0 as "the first class is 1"."""
    old = {"dataset": "folder", "ignore_index": 0, "scenes_size": 128}
    config = DataConfig.from_json(old)
    assert (config.ignore_index, config.reduce_zero_label) == (None, True)
    new = DataConfig.from_json({**old, "reduce_zero_label": False})
    assert (new.ignore_index, new.reduce_zero_label) == (0, False)
    assert DataConfig.from_json({**old, "ignore_index": 7}).reduce_zero_label is False
