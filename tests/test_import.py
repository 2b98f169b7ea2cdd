"""`import segheads` loads nothing, and its names load no more than they need."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import segheads
from segheads.heads import HEADS

ROOT = Path(__file__).parents[1]
HEAVY = ("matplotlib", "tyro", "tqdm", "accelerate")
STATEMENTS = [
    "from segheads import MeanShiftHead, create_model",
    "from segheads import *",
]
ASKED = """
import builtins
original, asked = builtins.__import__, set()

def noting(name, globals=None, *others, **options):
    if (globals or {}).get("__name__", "").startswith("segheads") and name.split(".")[0] in HEAVY:
        asked.add(f"{globals['__name__']} asks for {name}")
    return original(name, globals, *others, **options)

builtins.__import__ = noting
"""


def run(code):
    """What a fresh process prints."""
    command = [sys.executable, "-W", "ignore", "-c", f"HEAVY = {HEAVY}\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_alone_loads_nothing_but_its_version():
    code = "import sys\nbefore = set(sys.modules)\nimport segheads\nprint(*sorted(set(sys.modules) - before))"
    loaded = run(code).split()
    assert {name for name in loaded if name.startswith("segheads")} == {"segheads", "segheads.version"}
    others = {name.split(".")[0] for name in loaded} - {"segheads"}
    assert not others - sys.stdlib_module_names


@pytest.mark.parametrize("statement", STATEMENTS)
def test_names_ask_for_no_plots_bars_command_lines_or_processes(statement):
    assert run(f"{ASKED}\n{statement}\nprint(*sorted(asked), sep='; ')") == ""


def test_asking_is_noticed():
    assert run(f"{ASKED}\nimport segheads.drawing\nprint('matplotlib.figure' in str(asked))") == "True"


def test_names_are_the_same_for_people_and_for_type_checkers():
    tree = ast.parse(Path(segheads.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen.pop("*") == "segheads.heads"
    assert seen == {name: f"segheads.{module}" for name, module in segheads._MODULES.items()}
    assert set(segheads.__all__) == {*seen, *importlib.import_module("segheads.heads").__all__}


@pytest.mark.parametrize("name", segheads.__all__)
def test_every_name_is_there(name):
    assert getattr(segheads, name) is getattr(segheads, name)
    assert name in dir(segheads)


def test_heads_need_no_line_of_their_own():
    source = Path(segheads.__file__).read_text()
    for kind in HEADS.values():
        assert getattr(segheads, kind.__name__) is kind
        assert kind.__name__ not in source


def test_modules_are_there_and_wrong_names_are_not():
    assert segheads.functional.mean_shift is importlib.import_module("segheads.functional").mean_shift
    for name in ("MeanShitHead", "_nothing", "ModelPlan"):
        with pytest.raises(AttributeError, match=f"^module 'segheads' has no attribute '{name}'$"):
            getattr(segheads, name)
