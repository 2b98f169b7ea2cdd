"""The one place that catches and prints, and the list of commands."""

import dataclasses
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from segheads.cli import list_commands
from segheads.cli import main as segheads_main
from segheads.cli.run import USAGE, advise, run
from segheads.data import DataConfig
from segheads.errors import (
    DataMissingError,
    DivergedError,
    OptionError,
    PretrainedWeightsError,
    RunEndedError,
    RunExistsError,
    StoppedError,
)
from segheads.inference import InferenceProtocol


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to do."""

    demo: bool = False
    """Another default."""
    output: Path = Path("here")
    """A folder."""
    data: DataConfig = DataConfig()
    """The data."""
    protocol: InferenceProtocol = InferenceProtocol()
    """The protocol."""


def test_options_of_parts_stand_side_by_side_and_the_result_comes_back():
    read = run(lambda config: config, Config, args=["--dataset", "camvid", "--scales", "0.5", "1", "--output", "there"])
    assert (read.data.dataset, read.protocol.scales, read.output) == ("camvid", (0.5, 1.0), Path("there"))


def test_demo_has_defaults_of_its_own():
    demo = Config(demo=True, data=DataConfig(dataset="scenes"))
    assert run(lambda config: config, Config, demo=demo, args=["--demo"]).data.dataset == "scenes"
    assert run(lambda config: config, Config, demo=demo, args=[]).data.dataset == "ade20k"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OptionError("depth must be 1 or more; got 0"), "error: depth must be 1 or more; got 0\n"),
        (DivergedError("not finite", 7), "error: not finite\n"),
        (OSError("disk full"), "error: disk full\n"),
        (RunExistsError("there is one"), "error: there is one\n--output PATH takes another folder\n"),
        (
            DataMissingError("no data"),
            "error: no data\n--data-root PATH says where it is, --download fetches it (about 1 GB), and --demo trains "
            "without any data\n",
        ),
        (PretrainedWeightsError("no weights"), "error: no weights\n"),  # this program has no option that helps
    ],
)
def test_what_a_user_can_mend_is_one_line_and_what_helps(capsys, error, shown):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, Config, args=[])
    assert stop.value.code == USAGE == 2
    captured = capsys.readouterr()
    assert captured.err == shown
    assert captured.out == ""


def test_values_that_a_part_refuses_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run(print, Config, args=["--stride", "3"])
    assert stop.value.code == 2
    assert "a stride needs a window, got stride 3" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--window", "x"], "--window: expected INT or INT INT; got 'x'; "),
        (["--stride", "1", "x"], "--stride: expected INT or INT INT; got '1', 'x'; "),
        (["--scenes-size", "x"], "--scenes-size: expected a whole number; got 'x'; "),
        (["--scales", "1", "x"], "--scales: "),
    ],
)
def test_words_that_are_no_numbers_are_named_in_short(capsys, words, shown):
    with pytest.raises(SystemExit) as stop:
        run(print, Config, args=words)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown in said
    assert "class" not in said
    assert said.endswith(" --help lists the options\n")
    assert said.count("\n") == 1


def test_other_processes_are_silent(capsys, monkeypatch):
    def main(config):
        logging.getLogger("segheads.x").info("progress")
        raise OptionError("no")

    for rank, shown in (("0", ("progress\n", "error: no\n")), ("1", ("", ""))):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            run(main, Config, args=[])
        assert stop.value.code == 2
        assert tuple(capsys.readouterr()) == shown


def test_what_ended_one_process_is_told_by_it(capsys, monkeypatch):
    def stopped(config, cause):
        raise StoppedError("stopped by SIGTERM") from cause

    def ended(config):
        raise RunEndedError("a.png is gone")

    monkeypatch.setenv("RANK", "1")
    for main, shown in (
        (ended, "error: process 1: a.png is gone\n"),
        (partial(stopped, cause=RuntimeError("connection closed by peer")), "process 1: stopped by SIGTERM"),
        (partial(stopped, cause=None), ""),  # as all are, the main process too
    ):
        with pytest.raises(SystemExit):
            run(main, Config, args=[])
        told = capsys.readouterr().err
        assert told.startswith(shown)
        assert bool(told) == bool(shown)


@pytest.mark.parametrize("bug", [TypeError("x"), ValueError("x"), RuntimeError("x")])
def test_a_bug_keeps_its_traceback(bug):
    def main(config):
        raise bug

    with pytest.raises(type(bug)):
        run(main, Config, args=[])
    assert not logging.getLogger("segheads").handlers


def test_advice_only_for_data_that_can_be_fetched():
    config = Config(data=DataConfig(dataset="camvid"))
    assert "download" not in advise(DataMissingError("no"), config)
    assert advise(OptionError("no"), config) == ""
    assert advise(DataMissingError("no"), None) == ""


def test_help_lists_the_names_that_options_take(capsys):
    with pytest.raises(SystemExit):
        run(print, Config, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--dataset: ade20k, camvid, " in text
    assert "--head:" not in text


def test_commands_are_the_modules():
    folder = Path(sys.modules["segheads.cli"].__file__).parent
    assert list(list_commands()) == sorted(
        path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem not in ("__init__", "groups", "run")
    )
    assert all(text.endswith(".") for text in list_commands().values())


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        segheads_main(["nothing"])
    assert stop.value.code == 2
    assert "evaluate" in capsys.readouterr().err


def test_a_command_that_returns_something_ends_with_status_0(monkeypatch):
    """The installed script hands what `main` returns to `sys.exit`."""
    from segheads.cli import evaluate

    monkeypatch.setattr(evaluate, "main", lambda config: {"mIoU": 0.5})
    assert segheads_main(["evaluate", "--model", "anything"]) is None


def test_the_list_of_commands_comes_without_torch():
    program = "import sys, runpy; sys.argv = ['segheads', '--help']\n"
    program += "try: runpy.run_module('segheads', run_name='__main__')\n"
    program += "except SystemExit as stop: print(stop.code, sorted({'torch', 'timm', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "evaluate" in done.stdout


@pytest.mark.parametrize("name", ["evaluate", "analyse"])
def test_options_in_groups_are_those_of_the_configuration(name, capsys, monkeypatch):
    module = import_module(f"segheads.cli.{name}")
    names = {field.name for field in dataclasses.fields(module.Config)}
    grouped = [field for _, fields in module.GROUPS.values() for field in fields]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) < names
    given = []
    monkeypatch.setattr(module, "main", given.append)
    segheads_main([name, "--model", "a", "--scale", "64", "48", "--class-names", "b", "c"])
    assert given == [module.Config(model="a", scale=(64, 48), class_names=("b", "c"))]
    with pytest.raises(SystemExit):
        segheads_main([name, "--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^\W+ ((?:\w+ )?options) \W+$", text, re.MULTILINE) == [
        "options",
        *(f"{group} options" for group in module.GROUPS),
    ]
    assert all(f"--{field.replace('_', '-')}" in text for field in names)
    assert "Longest and shortest side, pixels," in text


def test_a_command_names_its_options_and_mistakes(capsys):
    with pytest.raises(SystemExit) as stop:
        segheads_main(["evaluate", "--help"])
    assert stop.value.code == 0
    assert "usage: segheads evaluate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        segheads_main(["evaluate", "--model", "nowhere", "--whole", "--slide", "--dataset", "scenes"])
    assert stop.value.code == 2
    assert "leave one out" in capsys.readouterr().err


def test_traceback_shows_where_an_error_came_from_before_its_line(capsys):
    def fail(config):
        raise OptionError("no")

    for words, count in (([], 1), (["--traceback"], 2)):
        with pytest.raises(SystemExit):
            run(fail, Config, args=words)
        shown = capsys.readouterr().err
        assert shown.endswith("error: no\n")
        assert shown.count("no\n") == count
        assert ("in fail" in shown) == bool(words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--scenes-size", "x"], "--scenes-size: expected a whole number"),
        (["--scenessize", "3"], "Unrecognized options: --scenessize, 3"),
        (["--exif", "upside"], "invalid choice 'upside' for argument '--exif'"),
        (["--dataset"], "Missing value for argument"),
        (["--max-pixels", "0"], "max_pixels must be 1 or more; got 0"),
        (["--scale", "1"], "--scale"),
    ],
)
def test_words_that_cannot_be_read_are_one_line(capsys, words, named):
    with pytest.raises(SystemExit) as stop:
        run(print, Config, args=words)
    assert stop.value.code == USAGE
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert named in shown
    assert "│" not in shown
    assert "╭" not in shown


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_seen_enough_is_no_fault(lines):
    program = f"""
import dataclasses, sys
from segheads.cli.run import run

@dataclasses.dataclass
class Config:
    x: int = 0

def main(config):
    sys.stdin.read()  # until the reader is gone
    print("line\\n" * {lines})

run(main, Config, args=[])
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (128 + 13, "")
