"""The public surface: names and signatures are those of `api_surface.json`, and change only on purpose.

`python tests/test_api_surface.py` writes the file anew. Annotations and defaults are left out, and so is what classes
inherit from other libraries: the file is the same for every version of Python and of what segheads depends on.
"""

import difflib
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import typing
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path

import segheads

SURFACE = Path(__file__).with_name("api_surface.json")


class Given:
    """Stands for a default of any value."""

    def __repr__(self):
        return "..."


def surface():
    """What each public name is, by its shortest path, and the members of classes; other paths refer to that one."""
    names = ["segheads", *(module.name for module in pkgutil.walk_packages(segheads.__path__, "segheads."))]
    modules = [importlib.import_module(name) for name in names]
    paths = sorted(
        ((f"{module.__name__}.{name}", getattr(module, name)) for module in modules for name in public(module)),
        key=lambda item: (item[0].count("."), item[0]),
    )
    found, first = {}, {}
    for path, value in paths:
        is_alias = typing.get_origin(value) is not None
        known = first.setdefault(id(value), path) if callable(value) and not is_alias else path
        found |= {path: f"is {known}"} if known != path else described(path, value)
    return dict(sorted(found.items()))


def public(module):
    return getattr(module, "__all__", ())


def described(path, value):
    if typing.get_origin(value) is not None:  # before classes: Python 3.10 takes list[int] for one
        return {path: "alias"}
    if inspect.isclass(value) and is_ours(value):
        return {path: f"class{constructor(value)}"} | {f"{path}.{name}": kind for name, kind in members(value).items()}
    return {path: f"def{signature(value)}" if callable(value) else f"constant {type(value).__name__}"}


def is_ours(kind):
    return kind.__module__.partition(".")[0] == "segheads"


def constructor(kind):
    """Arguments of a class that says itself how it is made."""
    if typing.is_typeddict(kind) or hasattr(kind, "__required_keys__"):
        return f"({', '.join(sorted(kind.__required_keys__))}; {', '.join(sorted(kind.__optional_keys__))})"
    owner = next(owner for owner in kind.__mro__ if {"__init__", "__new__"} & vars(owner).keys())
    if not is_ours(owner) or getattr(kind, "_is_protocol", False):
        return ""
    maker = vars(owner).get("__init__") or vars(owner)["__new__"].__func__
    return signature(maker, skip=1)


def members(kind):
    """Public methods, properties and annotated attributes that classes of segheads define."""
    found = {}
    for owner in reversed([owner for owner in kind.__mro__ if is_ours(owner)]):
        if not is_dataclass(owner):  # whose fields are the constructor's arguments
            found |= dict.fromkeys(inspect.get_annotations(owner), "attribute")
        for name, value in vars(owner).items():
            if isinstance(value, (property, cached_property)):
                found[name] = "property"
            elif isinstance(value, (classmethod, staticmethod)):
                found[name] = f"{type(value).__name__}{signature(value.__func__)}"
            elif inspect.isfunction(value):
                found[name] = f"def{signature(value)}"
    return {name: what for name, what in found.items() if not name.startswith("_") or name == "__call__"}


def signature(value, skip=0):
    """Names and kinds of the arguments, and which may be left out."""
    arguments = [
        x.replace(annotation=x.empty, default=x.empty if x.default is x.empty else Given())
        for x in inspect.signature(value).parameters.values()
    ]
    return str(inspect.Signature(arguments[skip:]))


def written(found):
    return json.dumps(found, indent=1) + "\n"


def test_the_public_surface_changes_only_on_purpose():
    before, now = SURFACE.read_text().splitlines(), written(surface()).splitlines()
    changes = [line for line in difflib.unified_diff(before, now, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    assert not changes, (
        "the public surface is another; if that is meant, run `python tests/test_api_surface.py` and tell users in "
        "CHANGELOG.md\n" + "\n".join(line for line in changes if not line.startswith("@@"))
    )


def test_import_loads_no_more_than_a_model_needs():
    unwanted = ["matplotlib", "tyro", "accelerate", "torchmetrics"]  # tqdm comes with huggingface_hub
    code = f"import sys, segheads; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    found = written(surface())
    print("unchanged" if found == SURFACE.read_text() else f"written to {SURFACE}")
    SURFACE.write_text(found)
