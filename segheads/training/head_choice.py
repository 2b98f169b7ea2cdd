"""A head, its options and its pyramid as one word of a command line."""

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from segheads.heads import find_head
from segheads.pyramids import find_pyramid


@dataclass(frozen=True)
class HeadChoice:
    """A head with its options and its pyramid, in the words of `create_model`.

    Args:
        head: A name of `list_heads()`.
        head_kwargs: Options of the head.
        pyramid: `"auto"`, a registered pyramid, or None for the backbone's own maps.
        pyramid_kwargs: Options of the pyramid.
    """

    head: str
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    pyramid: str | None = "auto"
    pyramid_kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The text that `parse_head` reads."""
        text = _call(self.head, self.head_kwargs)
        return text if self.pyramid == "auto" else f"{text} @ {_call(str(self.pyramid), self.pyramid_kwargs)}"

    def create_kwargs(self) -> dict[str, Any]:
        """Its arguments of `create_model`."""
        return {"head_kwargs": self.head_kwargs, "pyramid": self.pyramid, "pyramid_kwargs": self.pyramid_kwargs}


def parse_head(text: str) -> HeadChoice:
    """Read a head from one word of a command line: `HEAD(option=value, ...) @ PYRAMID(option=value, ...)`.

    Both brackets and the pyramid may be left out; `@ None` takes the backbone's own maps. Values are Python literals.

    Args:
        text: Such as `"linear"`, `"mean_shift(num_layers=2)"` or `"smp:unet @ fpn(out_channels=64)"`.

    Raises:
        ValueError: If the text is not of that form, or names an unknown head or pyramid.

    Examples:
        >>> parse_head("senformer(merge='product') @ fpn(out_channels=64)")
        HeadChoice(head='senformer', head_kwargs={'merge': 'product'},
                   pyramid='fpn', pyramid_kwargs={'out_channels': 64})
        >>> str(parse_head("smp:unet(decoder_use_norm=False)"))
        'smp:unet(decoder_use_norm=False)'
    """
    try:
        tree = ast.parse(re.sub(r"^\s*smp:", "smp_", text).strip(), mode="eval").body
        head, pyramid = (tree.left, tree.right) if isinstance(tree, ast.BinOp) else (tree, None)
        if isinstance(tree, ast.BinOp) and not isinstance(tree.op, ast.MatMult):
            raise ValueError("an operator other than @")
        name, options = _read_call(head)
        neck, neck_options = ("auto", {}) if pyramid is None else _read_call(pyramid)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"a head must be NAME, NAME(option=value, ...) or either followed by @ PYRAMID(option=value, ...); "
            f"got {text!r}"
        ) from error
    name = re.sub(r"^smp_", "smp:", name)
    find_head(name)
    if neck not in ("auto", "None"):
        find_pyramid(neck)
    return HeadChoice(name, options, None if neck == "None" else neck, neck_options)


def _read_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    """Name and options of `name` or `name(option=value)`."""
    if isinstance(node, ast.Name):
        return node.id, {}
    if isinstance(node, ast.Constant) and node.value is None:
        return "None", {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("no call with named options")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("options without a name")
    return node.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}


def _call(name: str, options: dict[str, Any]) -> str:
    listed = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({listed})" if options else name
