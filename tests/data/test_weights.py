"""Weights of classes: counted, effective, read from a file."""

import json
import math

import pytest

from segheads.data import SplitScan, class_weights
from segheads.errors import DataError, OptionError

SCAN = SplitScan(class_names=("a", "b", "c"), samples=50, pixels=(7000, 500, 0), images=(50, 20, 0))


def test_balanced_classes_weigh_the_same_in_sum():
    weights = class_weights("balanced", SCAN)
    assert weights[0] * 7000 == pytest.approx(weights[1] * 500, rel=1e-3)
    assert weights[0] * 7000 + weights[1] * 500 == pytest.approx(7500, rel=1e-3)  # 1 on average of the pixels
    assert weights[2] == 1


def test_effective_numbers_are_the_sums_of_their_series():
    """Cui et al., equation 2: the effective number of n samples is 1 + b + ... + b^(n - 1)."""
    weights = class_weights("effective", SCAN)
    numbers = [math.fsum(0.9999**k for k in range(n)) for n in (50, 20)]
    assert weights[0] / weights[1] == pytest.approx(numbers[1] / numbers[0], rel=1e-3)
    assert weights[0] + weights[1] == pytest.approx(2, rel=1e-3)
    assert weights[2] == 1


def test_nothing_that_occurs():
    nothing = SplitScan(class_names=("a", "b"), pixels=(0, 0), images=(0, 0))
    assert class_weights("balanced", nothing) == class_weights("effective", nothing) == (1, 1)


@pytest.mark.parametrize("text", ["[1, 2.5, 0]", '{"c": 0, "b": 2.5, "a": 1}'])
def test_weights_of_a_file(tmp_path, text):
    path = tmp_path / "weights.json"
    path.write_text(text)
    assert class_weights(str(path), SCAN) == (1, 2.5, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list of 2; it should hold a list of 3 numbers"),
        ({"a": 1, "b": 2, "d": 3}, r"lacks \['c'\] and has \['d'\]"),
        ("balanced", "holds str"),
        ([1, 2, -1], r"holds \[1, 2, -1\]"),
        ([1, 2, float("nan")], r"holds \[1, 2, nan\]"),
        ([1, 2, "3"], r"holds \[1, 2, '3'\]"),
        ([1, 2, True], r"holds \[1, 2, True\]"),
        ([0, 0, 0], r"holds \[0, 0, 0\]"),
    ],
)
def test_files_that_do_not_fit(tmp_path, value, message):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        class_weights(str(path), SCAN)


def test_no_json_and_no_such_rule(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text("1 2 3")
    with pytest.raises(DataError, match="is no JSON"):
        class_weights(str(path), SCAN)
    with pytest.raises(OptionError, match="must be balanced, effective or the path of a JSON file; got 'balance'"):
        class_weights("balance", SCAN)
