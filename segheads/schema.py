"""JSON values from elsewhere against annotations: types, sizes and ranges, before anything is made of them."""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from typing_extensions import Unpack, get_type_hints, is_typeddict

LONGEST_WORD, LONGEST_LIST, DEEPEST = 1024, 70_000, 6
WHOLE_NUMBERS = (-100, 10_000_000)  # where no row of LIMITS says otherwise
NUMBERS = (-1e9, 1e9)

# From and to, by the name of an option, wherever it stands: sizes that are built or walked through.
# fmt: off
LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(["num_classes", "in_chans"], (1, 32_767)),
    **dict.fromkeys(["num_layers", "depth", "depths", "mean_shift_layers", "layers", "levels", "freeze_stages"],
                    (0, 512)),
    **dict.fromkeys(["channels", "out_channels", "shift_channels", "decoder_channels", "embed_dim", "embed_dims",
                     "dims"], (1, 65_536)),
    **dict.fromkeys(["num_heads", "num_outputs", "learners_per_level"], (1, 1024)),
    **dict.fromkeys(["window_size", "kernel_size"], (1, 64)),
    **dict.fromkeys(["img_size"], (1, 4096)),
    **dict.fromkeys(["patch_size", "patch_sizes"], (1, 256)),
    **dict.fromkeys(["scale", "window", "stride"], (1, 65_536)),
    "scales": (1e-3, 16),
    **dict.fromkeys(["drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate",
                     "patch_drop_rate", "label_smoothing"], (0, 1)),
    **dict.fromkeys(["ignore_index", "label_values"], (-(2**31), 2**31)),
    "seed": (0, 2**64),
    "train_images": (1, 10**9),
    "mlp_ratio": (1e-3, 1024),
    "norm_eps": (0, 1),
    "auxiliary_weight": (0, 1e6),
    "palette": (0, 255),
}
# fmt: on


def check_value(value: Any, hint: Any, where: str) -> None:
    """Refuse a value that is not what an annotation says, or is beyond the limits of its name.

    Args:
        value: As `json.loads` gave it; lists stand for tuples.
        hint: An annotation; what JSON cannot hold, such as a callable, is left out of unions. `Any` takes all JSON.
        where: The way to the value, such as `model.head_kwargs.channels`, of which the last name has the limits.

    Raises:
        ValueError: The message begins with `where`.

    Examples:
        >>> check_value([64, 128], Sequence[int], "pyramid.channels")
        >>> check_value("many", int | None, "head.channels")
        Traceback (most recent call last):
        ValueError: head.channels must be a whole number or null; got 'many'
    """
    if is_typeddict(hint):
        _check_fields(value, get_type_hints(hint), where)
        return
    kinds = _alternatives(hint)
    if Any in kinds:
        _check_json(value, where)
    elif not any(_fits(value, kind) for kind in kinds):
        expected = " or ".join(dict.fromkeys(map(_named, kinds))) or "left out"
        raise ValueError(f"{where} must be {expected}; got {short(value)}")
    else:
        _check_inside(value, next(kind for kind in kinds if _fits(value, kind)), where)


def check_options(
    values: Mapping[str, Any], build: Callable[..., Any], where: str, *, besides: Collection[str] = ()
) -> None:
    """Refuse options that a class or a function does not take, or not of that kind.

    Args:
        values: Options by name, as `json.loads` gave them.
        build: What takes them.
        where: The way to them, for messages.
        besides: Parameters of `build` that are none of the options.

    Raises:
        ValueError: The message begins with `where`.

    Examples:
        >>> from segheads.heads import FCNHead
        >>> check_options({"width": 8}, FCNHead, "head_kwargs", besides=("in_channels", "num_classes"))
        Traceback (most recent call last):
        ValueError: head_kwargs.width is no option of FCNHead; it has channels, num_layers, kernel_size, ...
    """
    takes: Any = build.__init__ if inspect.isclass(build) else build
    known, rest = _hints(takes, build), None
    for parameter in inspect.signature(build).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = known.pop(parameter.name, Any)
            if get_origin(rest) is Unpack:
                known |= get_type_hints(get_args(rest)[0])
                rest = None
    known = {name: hint for name, hint in known.items() if name not in besides}
    for name, value in values.items():
        if name in besides or (name not in known and rest is None):
            title = getattr(build, "__name__", type(build).__name__)
            raise ValueError(f"{where}.{short_name(name)} is no option of {title}; it has {', '.join(known) or 'none'}")
        check_value(value, known.get(name, Any), f"{where}.{name}")


def check_fields(values: Any, kind: type, where: str = "", *, others: Collection[str] = ()) -> None:
    """Refuse values that are not those of a dataclass's fields.

    Args:
        values: Fields by name, as `json.loads` gave them.
        kind: A dataclass.
        where: The way to them, for messages; empty at the top.
        others: Names that are passed over.

    Raises:
        ValueError: The message begins with the field that is wrong.
    """
    hints = get_type_hints(kind)
    own = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    _check_fields(values, own, where, others=others)


def short(value: Any, most: int = 80) -> str:
    """A value for a message, shortened.

    Args:
        value: Any JSON value.
        most: How many letters.
    """
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"a {'list' if isinstance(value, list) else 'dictionary'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = ascii(value)
    return text if len(text) <= most else f"{text[:most]}..."


def short_name(name: str) -> str:
    """A name for a message: as it is where it is one, else spelled out and shortened."""
    return name if name.isidentifier() and len(name) <= 80 else short(name)


def _check_fields(values: Any, hints: Mapping[str, Any], where: str, *, others: Collection[str] = ()) -> None:
    dot = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'it'} must be a dictionary; got {short(values)}")
    for name, value in values.items():
        if name in others:
            continue
        if name not in hints:
            raise ValueError(f"{dot}{short_name(name)} is not known here; there are {', '.join(hints)}")
        check_value(value, hints[name], f"{dot}{name}")


def _alternatives(hint: Any) -> list[Any]:
    """The kinds of a union that JSON can hold."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    if get_origin(hint) is Callable or hint is Callable:
        return []
    return [hint]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, whatever it holds."""
    origin = get_origin(kind)
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(kind))
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_typeddict(kind) or kind is dict or origin in (dict, Mapping):
        return isinstance(value, dict)
    if kind in (list, tuple) or origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and _has_length(value, kind)
    return isinstance(value, str) or (inspect.isclass(kind) and isinstance(value, kind))  # a word stands for a path


def _has_length(value: Sequence[Any], kind: Any) -> bool:
    parts = get_args(kind)
    return get_origin(kind) is not tuple or not parts or parts[-1] is Ellipsis or len(value) == len(parts)


def _check_inside(value: Any, kind: Any, where: str) -> None:
    if is_typeddict(kind):
        check_value(value, kind, where)
    elif isinstance(value, (list, tuple)):
        _check_size(value, where)
        parts = [part for part in get_args(kind) if part is not Ellipsis] or [Any]
        for index, each in enumerate(value):
            check_value(each, parts[index if len(parts) > 1 else 0], f"{where}[{index}]")
    else:
        _check_json(value, where)


def _check_json(value: Any, where: str, deep: int = 0) -> None:
    """Bounds of any JSON value."""
    if deep > DEEPEST:
        raise ValueError(f"{where} is nested more than {DEEPEST} deep")
    _check_size(value, where)
    if isinstance(value, dict):
        for name, each in value.items():
            _check_json(name, where, deep)
            _check_json(each, f"{where}.{short_name(name)}", deep + 1)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            _check_json(each, f"{where}[{index}]", deep + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = LIMITS.get(_option(where), NUMBERS if isinstance(value, float) else WHOLE_NUMBERS)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{where} must be from {low:g} to {high:g}; got {short(value)}")


def _check_size(value: Any, where: str) -> None:
    most = LONGEST_WORD if isinstance(value, str) else LONGEST_LIST
    if isinstance(value, (str, list, tuple, dict)) and len(value) > most:
        kind = "letters" if isinstance(value, str) else "entries"
        raise ValueError(f"{where} must have at most {most} {kind}; got {len(value)}")


def _option(where: str) -> str:
    """The name of the option that a value stands under: of `a.depths[3]` depths."""
    return where.rpartition(".")[2].partition("[")[0]


def _named(kind: Any) -> str:
    """A kind in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", None: "null"}
    if kind in (None, type(None)):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind) and get_args(kind):
        return f"a list of {len(get_args(kind))}"
    if kind in (list, tuple) or get_origin(kind) in (list, tuple, Sequence):
        return "a list"
    if is_typeddict(kind) or kind is dict or get_origin(kind) in (dict, Mapping):
        return "a dictionary"
    return words.get(kind, "a word")


def _hints(takes: Any, build: Any) -> dict[str, Any]:
    """The annotation of each parameter but `self`; Any where there is none."""
    try:
        known = get_type_hints(takes)
    except (NameError, TypeError):  # a part of somebody's own, annotated with what is not there
        known = {}
    return {name: known.get(name, Any) for name in inspect.signature(build).parameters}
