import pytest

from segheads import create_model
from segheads.classes import Classes
from segheads.data import DataConfig, open_dataset
from segheads.errors import OptionError
from segheads.saving import find_folder

ARMS = Classes(("sky", "left arm", "right arm"))


@pytest.mark.parametrize("pairs", [((1, 1),), ((0, 1), (1, 2)), ((1, 3),), ((-1, 1),)])
def test_wrong_pairs_are_named(pairs):
    with pytest.raises(ValueError, match="flip_pairs must be pairs of 3 classes, each in one pair at most; got "):
        Classes(ARMS.names, flip_pairs=pairs)


def test_names_that_make_no_pairs_are_named():
    with pytest.raises(ValueError, match="for each pair; no class is called 'leg'"):
        ARMS.with_flip_pairs(["left arm", "leg"])
    with pytest.raises(ValueError, match="for each pair; got 1 names"):
        ARMS.with_flip_pairs(["left arm"])


def test_names_that_speak_of_sides():
    assert ARMS.sides == ("left arm", "right arm")
    assert Classes(("Left_leg", "bright", "leftover", "leg-right", "copyright")).sides == ("Left_leg", "leg-right")
    assert ARMS.with_flip_pairs(["left arm", "right arm"]).sides == ()


def test_a_data_set_and_a_saved_model_keep_pairs(tmp_path):
    config = DataConfig(dataset="scenes", train_images=3, flip_pairs=("sky", "road"))
    classes = open_dataset(config, "train").classes
    names = [classes.names[index] for pair in classes.flip_pairs for index in pair]
    assert names == ["sky", "road"]
    assert open_dataset(config, "val").classes == classes
    model = create_model("test_vit", "linear", len(classes), pretrained=False)
    model.classes = classes
    model.save_pretrained(tmp_path)
    assert find_folder(str(tmp_path)).classes == classes
    with pytest.raises(OptionError, match="no class is called 'left arm'"):
        open_dataset(DataConfig(dataset="scenes", flip_pairs=("left arm", "right arm")), "val")
