"""Every registered head: the tester's checks, and what the documentation owes it."""

from pathlib import Path

import pytest
from testers import HeadTester

import segheads
from segheads import HEADS, list_heads
from segheads.heads import find_head

DOCS = Path(__file__).parents[2] / "docs"
ALL_HEADS = pytest.mark.parametrize("name", list(HEADS))


@ALL_HEADS
class TestHeads(HeadTester):
    pass


@ALL_HEADS
def test_is_public(name):
    class_name = HEADS[name].__name__
    assert getattr(segheads, class_name) is HEADS[name]
    assert class_name in segheads.heads.__all__


def test_unknown_names_list_the_known():
    assert list_heads()[: len(HEADS)] == list(HEADS)
    with pytest.raises(ValueError, match="'mean_shfit'; known: linear, .*did you mean 'mean_shift'"):
        find_head("mean_shfit")
