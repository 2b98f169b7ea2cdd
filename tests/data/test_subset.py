import pytest
import torch

from segheads.data import Scenes
from segheads.data.subset import SubsetDataset


def test_smaller_subsets_are_parts_of_larger_ones():
    scenes = Scenes(size=(16, 16), length=50)
    subsets = [SubsetDataset(scenes, length, seed=3) for length in (5, 20, 50)]
    assert [len(subset) for subset in subsets] == [5, 20, 50]
    assert set(subsets[0].indices) < set(subsets[1].indices) < set(subsets[2].indices) == set(range(50))
    assert subsets[0].indices == SubsetDataset(scenes, 5, seed=3).indices != SubsetDataset(scenes, 5, seed=4).indices


def test_items_are_the_data_sets():
    scenes = Scenes(size=(16, 16), length=50)
    scenes.ignore_index = 254
    subset = SubsetDataset(scenes, 5)
    assert (subset.class_names, subset.palette, subset.ignore_index) == (scenes.class_names, scenes.palette, 254)
    for index, original in enumerate(subset.indices):
        assert subset.name(index) == scenes.name(original)
        for ours, theirs in zip(subset[index], scenes[original], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [0, 51])
def test_a_size_that_cannot_be_is_named(length):
    with pytest.raises(ValueError, match=f"must have 1 to 50 images, which are all there are; got {length}"):
        SubsetDataset(Scenes(length=50), length)


@pytest.mark.parametrize(
    ("length", "indices"), [(1, [0]), (3, [0, 4, 9]), (10, list(range(10))), (99, list(range(10)))]
)
def test_images_at_equal_distances(length, indices):
    assert SubsetDataset.spaced(Scenes(length=10), length).indices == indices
