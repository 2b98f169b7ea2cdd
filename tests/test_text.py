"""Text is UTF-8, whatever the locale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import miniatures
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("segheads", "recipes") for path in (ROOT / folder).rglob("*.py"))
NAMES = ("天空", "Straße", "ciel é")


def without_encoding(source):
    """Lines of the calls that open text without saying how it is encoded."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(word.arg in ("encoding", "seed") for word in call.keywords):
            # "seed": that of a data set
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        whose = getattr(call.func, "value", None)
        owner = getattr(whose, "id", None)
        modes = [x.value for x in (*call.args, *(w.value for w in call.keywords)) if isinstance(x, ast.Constant)]
        binary = any(isinstance(mode, str) and set(mode) <= set("rwab+") and "b" in mode for mode in modes)
        texts = name in ("read_text", "write_text") and whose is not None  # our own function has no owner
        if texts or (name == "open" and not binary and owner not in ("os", "Image")):
            lines.append(call.lineno)
    return lines


def test_what_opens_text_says_utf_8():
    found = {path: without_encoding(path.read_text(encoding="utf-8")) for path in FILES}
    assert [f"{path.relative_to(ROOT)}:{line}" for path, lines in found.items() for line in lines] == []


@pytest.mark.parametrize(
    ("source", "is_bad"),
    [
        ("path.read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("path.open('a')", True),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("(a / b).open('w')", True),
    ],
)
def test_the_check_above_can_fail(source, is_bad):
    assert bool(without_encoding(source)) == is_bad


def test_a_run_with_pictures_in_a_locale_of_ascii(tmp_path):
    data = miniatures.own_folder(tmp_path / "data", (0, 1, 2))
    for file in [*data.rglob("*.jpg"), *data.rglob("*.png")]:
        file.rename(file.with_name(f"ü{file.name}"))
    out = tmp_path / "run"
    options = {
        **{"data-root": data, "output": out, "backbone": "test_vit", "head": "linear", "crop-size": 32},
        **{"window": None, "stride": None, "iterations": 2, "batch-size": 2, "workers": 0, "threads": 1},
        **{"pictures": 1, "tracker": "none", "dataset": "folder"},
    }
    train = [ROOT / "recipes" / "segmenter_ade20k.py", "--no-pretrained", "--scale", 32, 32, "--class-names", *NAMES]
    train += [word for name, value in options.items() for word in (f"--{name}", value)]
    evaluate = ["-m", "segheads", "evaluate", "--model", out, "--workers", 0, "--pictures", 1]
    for command in (train, evaluate):
        ended = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, cwd=tmp_path, env=ascii_environment()
        )
        assert ended.returncode == 0, ended.stderr.decode(errors="replace")[-2000:]
        assert b"Logging error" not in ended.stderr
    for file in ("per_class.md", "evaluation/results.md"):
        text = (out / file).read_text(encoding="utf-8")
        assert all(f"| {name} |" in text for name in NAMES)
    images = (out / "evaluation" / "images.csv").read_text(encoding="utf-8")
    assert "ü" in images
    saved = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))
    assert tuple(saved["classes"]["names"]) == NAMES


def ascii_environment():
    """A process whose text is ASCII unless it says otherwise, as on a bare server."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return {**own, **ascii_only, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
