"""Where two label maps differ."""

import pytest
import torch

from segheads.analysis import OUTCOMES, compare_labels


def noise(seed: int, K: int = 4) -> torch.Tensor:
    return torch.randint(0, K, (9, 13), generator=torch.Generator().manual_seed(seed))


def slow_outcome(a: int, b: int, truth: int) -> str:
    if a == b:
        return "both right" if a == truth else "both wrong, alike"
    if a == truth:
        return "only the first right"
    return "only the second right" if b == truth else "both wrong, differently"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, 4])
def test_equals_slow_reference(dtype, ignore_index):
    first, second, truth = (noise(seed).to(dtype) for seed in range(3))
    truth[2:4, 5:] = ignore_index
    found = compare_labels(first, second, 4, truth, ignore_index=ignore_index)
    counts, pairs = dict.fromkeys(OUTCOMES, 0), torch.zeros(4, 4)
    for y in range(9):
        for x in range(13):
            a, b, t = (int(labels[y, x]) for labels in (first, second, truth))
            pairs[a, b] += 1 / (9 * 13)
            assert found.differs[y, x] == (a != b)
            if t == ignore_index:
                assert found.outcome[y, x] == 255
            else:
                assert OUTCOMES[found.outcome[y, x]] == slow_outcome(a, b, t)
                counts[slow_outcome(a, b, t)] += 1
    assert min(counts.values()) > 0
    torch.testing.assert_close(found.shares, torch.tensor(list(counts.values())) / sum(counts.values()))
    torch.testing.assert_close(found.pairs, pairs)


def test_without_a_truth():
    found = compare_labels(noise(0), noise(1), 4)
    assert found.outcome is None
    assert found.shares is None
    torch.testing.assert_close(found.pairs.trace().item(), 1 - found.differs.float().mean().item())


def test_all_ignored():
    found = compare_labels(noise(0), noise(0), 4, torch.full((9, 13), 255))
    assert not found.differs.any()
    torch.testing.assert_close(found.shares, torch.zeros(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": torch.zeros(9, 12, dtype=torch.long)}, r"one size; got first \(9, 13\), second \(9, 12\)"),
        ({"first": torch.zeros(1, 9, 13, dtype=torch.long)}, r"got first \(1, 9, 13\)"),
        ({"truth": torch.zeros(3, 3, dtype=torch.long)}, r"truth \(3, 3\)"),
        ({"first": torch.full((9, 13), 4)}, "first must hold labels 0 to 3; got 4"),
        ({"second": torch.full((9, 13), 255)}, "second must hold labels 0 to 3; got 255"),
        ({"truth": torch.full((9, 13), 254)}, "truth must hold labels 0 to 3; got 254"),
    ],
)
def test_maps_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        compare_labels(**{"first": noise(0), "second": noise(1), "num_classes": 4, "truth": noise(2)} | change)
