"""Options of a flat configuration in groups, for the help alone: what runs gets the flat one."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

C = TypeVar("C")
Groups = Mapping[str, tuple[str, Sequence[str]]]  # by name: words for the help, and the fields


def in_groups(config: type[C], groups: Groups) -> tuple[type[Any], Callable[[Any], C]]:
    """A dataclass with the fields of another one in parts, and what makes that of it again.

    Args:
        config: A dataclass whose fields have defaults, but for those in no group.
        groups: Its fields that belong together.

    Examples:
        >>> from segheads.cli import evaluate
        >>> kind, flat = in_groups(evaluate.Config, evaluate.GROUPS)
        >>> grouped = kind(model="a", protocol=dataclasses.replace(kind(model="").protocol, window=9))
        >>> flat(grouped) == evaluate.Config(model="a", window=9)
        True
    """
    hints, words = get_type_hints(config, include_extras=True), _words(config)
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]  # a command's is a dataclass

    def told(names: Sequence[str]) -> list[tuple[str, Any, Any]]:
        return [
            (name, Annotated[hints[name], tyro.conf.arg(help=words.get(name))], _default(fields[name]))
            for name in names
        ]

    parts = []
    for name, (text, names) in groups.items():
        kind = dataclasses.make_dataclass(name, told(names), frozen=True, kw_only=True, namespace={"__doc__": text})
        parts.append((name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=kind())))
    own = [name for name in fields if not any(name in names for _, names in groups.values())]
    outer = dataclasses.make_dataclass(
        config.__name__, [*told(own), *parts], frozen=True, kw_only=True, namespace={"__doc__": config.__doc__}
    )

    def flat(grouped: Any) -> C:
        values = {name: getattr(grouped, name) for name in own}
        return config(**values, **{key: x for name in groups for key, x in vars(getattr(grouped, name)).items()})

    return outer, flat


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return dataclasses.field(default=field.default)
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field()


def _words(config: type) -> dict[str, str]:
    """What stands below each field of a class."""
    (kind,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(kind, ast.ClassDef)
    found = {}
    for field, below in zip(kind.body, kind.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = inspect.cleandoc(str(getattr(below.value, "value", "")))
    return found
