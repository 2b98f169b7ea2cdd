"""Every option that is a number has a range, and what is outside of it is refused by name."""

import dataclasses
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
from runs import SMALL_RUN
from typing_extensions import TypedDict, is_typeddict

from segheads.cli import list_commands
from segheads.cli.run import parse
from segheads.errors import OptionError
from segheads.ranges import Range, check_ranges, find_ranges
from segheads.training import TrainingConfig, run_training

RECIPES = Path(__file__).parents[1] / "recipes"


def commands():
    """The `Config` of each command and recipe, by its name."""
    found = {name: importlib.import_module(f"segheads.cli.{name.replace('-', '_')}").Config for name in list_commands()}
    for path in sorted(RECIPES.rglob("*.py")):
        if "\nclass Config" in path.read_text(encoding="utf-8"):
            sys.path.insert(0, str(path.parent))  # as for a script
            spec = importlib.util.spec_from_file_location(f"ranges_{path.parent.name}_{path.stem}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.path.pop(0)
            found[path.relative_to(RECIPES).as_posix()] = module.Config
    return found


def parts(config):
    """A class of a configuration and those of its parts."""
    yield config
    for hint in get_type_hints(config).values():
        if dataclasses.is_dataclass(hint) or is_typeddict(hint):
            yield from parts(hint)


COMMANDS = commands()
FIELDS = sorted(
    {
        (part, name): (known, hint)
        for config in COMMANDS.values()
        for part in parts(config)
        for name, known in find_ranges(part).items()
        for hint in [get_type_hints(part)[name]]
    }.items(),
    key=lambda field: (field[0][0].__module__, field[0][0].__qualname__, field[0][1]),
)


def outside(known, hint):
    """Numbers just outside of a range, and what is none, as a field of a hint has them."""
    step = 1 if "float" not in str(hint) else 1e-6
    numbers = [known.low if known.above else known.low - step, known.high if known.below else known.high + step]
    numbers = [x if step < 1 else int(x) for x in numbers if math.isfinite(x)]
    numbers += [] if step == 1 else [math.nan, -math.inf, *([] if known.infinite else [math.inf])]
    return [(x,) if str(hint).startswith("tuple") else x for x in numbers]


def test_all_are_looked_at():
    assert len(FIELDS) > 100
    assert {"evaluate", "analyse", "check-data", "meanshifter_ade20k.py", "ablate_segmenter.py"} <= set(COMMANDS)


@pytest.mark.parametrize(("field", "found"), FIELDS, ids=[f"{part.__module__}-{name}" for (part, name), _ in FIELDS])
def test_what_is_outside_is_refused(field, found):
    (part, name), (known, hint) = field, found
    assert known is not None, f"{name} is a number and has no Range; write Annotated[{hint}, Range(...)]"
    for value in outside(known, hint):
        if is_typeddict(part):
            config = dataclasses.make_dataclass("Config", [("part", part)])({name: value})
        else:
            config = object.__new__(part)  # whatever else it needs
            for other in dataclasses.fields(part):
                object.__setattr__(config, other.name, None)
            object.__setattr__(config, name, value)
        with pytest.raises(OptionError) as refusal:
            check_ranges(config)
        assert str(refusal.value).startswith(f"{name} must be ")
        assert str(refusal.value).endswith(f"got {value}")


def test_a_field_without_a_range_is_told():
    @dataclasses.dataclass
    class Config:
        number: int = 0
        words: str = ""
        truth: bool = False

    assert find_ranges(Config) == {"number": None}


def test_another_default_keeps_the_range():
    class Step(TypedDict, total=False):
        size: Annotated[float | None, Range(0, above=True)]

    @dataclasses.dataclass
    class First:
        number: Annotated[int, Range(1)] = 2

    @dataclasses.dataclass
    class Second(First):
        number: int = 3
        step: Step = dataclasses.field(default_factory=dict)

    check_ranges(Second(step={"size": None}))
    with pytest.raises(OptionError, match="^number must be 1 or more; got 0$"):
        check_ranges(Second(0))
    with pytest.raises(OptionError, match="^size must be above 0; got 0$"):
        check_ranges(Second(step={"size": 0}))


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (Range(0, 2**32 - 1), "0 to 4294967295"),
        (Range(0, 1, above=True), "above 0 and at most 1"),
        (Range(0, 1, above=True, below=True), "above 0 and below 1"),
        (Range(high=3), "at most 3"),
        (Range(), "a finite number"),
    ],
)
def test_words_of_ranges(known, words):
    assert repr(known) == words


@pytest.mark.parametrize(
    "words", ["--keep-checkpoints -1", "--power -1", "--warmup-iterations -1", "--evaluate-every -1", "--step 0"]
)
def test_the_command_line_refuses(words, tmp_path):
    config, name = COMMANDS["meanshifter_ade20k.py"], words.split()[0][2:].replace("-", "_")
    with pytest.raises(OptionError, match=f"^{name} must be "):
        parse(config, words.split())


@pytest.mark.parametrize("name", ["keep_checkpoints", "power", "warmup_iterations", "evaluate_every", "log_every"])
def test_a_run_refuses_before_anything_is_built(name, tmp_path):
    config = TrainingConfig.from_flat(**{**SMALL_RUN, name: -1}, output=tmp_path / "run")
    with pytest.raises(OptionError, match=f"^{name} must be . or more; got -1$"):
        run_training(config, None)
    assert not (tmp_path / "run").exists()
