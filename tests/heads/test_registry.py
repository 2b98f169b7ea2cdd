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
def test_is_public_and_documented(name):
    class_name = HEADS[name].__name__
    assert getattr(segheads, class_name) is HEADS[name]
    pages = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert f"::: segheads.{class_name}" in pages, f"no page of docs/ has ::: segheads.{class_name}"


def test_unknown_names_list_the_known():
    assert list_heads()[: len(HEADS)] == list(HEADS)
    with pytest.raises(ValueError, match="'mean_shfit'; known: linear, .*did you mean 'mean_shift'"):
        find_head("mean_shfit")
