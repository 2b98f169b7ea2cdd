"""A model in words: what `create_model` decides before anything is built, as a value that prints and is saved."""

import ast
import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from segheads.classes import check_ignore_index, num_labels
from segheads.functional.upsample import Reduction
from segheads.heads import find_head
from segheads.losses import create_loss
from segheads.pyramids import find_pyramid


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The arguments of `create_model` with the pyramid decided: JSON values, from which a saved model is built again.

    Args:
        backbone: A name of `timm.list_models()`.
        head: A name of `list_heads()`.
        num_classes: Number of classes K.
        pyramid: A name in `segheads.pyramids.PYRAMIDS`, or None for the backbone's own maps.

    The rest is as in `create_model`.

    Raises:
        ValueError: If a name is unknown, a number out of range, `ignore_index` is a class, or the loss refuses the
            number of classes or an option.
    """

    backbone: str
    head: str
    num_classes: int
    pyramid: str | None = None
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    pyramid_kwargs: dict[str, Any] = field(default_factory=dict)
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    auxiliary_weight: float = 0.0
    auxiliary_kwargs: dict[str, Any] = field(default_factory=dict)
    ignore_index: int = 255
    loss_reduction: Reduction = "valid"
    stretch_logits: bool = False
    loss: str = "ce"
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    auxiliary_reduction: Reduction | None = None
    freeze_backbone: bool = False
    freeze_stages: int = 0

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, dict):  # the caller's own, who may change it before the model is saved
                object.__setattr__(self, entry.name, copy.deepcopy(value))
        find_head(self.head)
        if self.pyramid not in (None, "auto"):
            find_pyramid(str(self.pyramid))
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more; got {self.num_classes}")
        check_ignore_index(self.ignore_index, num_labels(self.num_classes))
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight must be 0 or more; got {self.auxiliary_weight}")
        if self.freeze_stages < 0 or (self.freeze_stages and self.freeze_backbone):
            raise ValueError(
                "freeze_stages must be 0 or more, and 0 with freeze_backbone, which freezes all stages; "
                f"got {self.freeze_stages}{' with it' if self.freeze_backbone else ''}"
            )
        if self.pyramid is None and self.pyramid_kwargs:
            raise ValueError(
                f"pyramid_kwargs {self.pyramid_kwargs} need a pyramid; {self.backbone} with {self.head} has none"
            )
        # refuses before anything is fetched
        create_loss(self.loss, self.num_classes, ignore_index=self.ignore_index, **self.loss_kwargs)

    def with_classes(self, num_classes: int) -> "ModelPlan":
        """The plan for another number of classes; what the loss has for each class is left out.

        Cross-entropy becomes that of a sigmoid for one class, and that of a softmax again for several.

        Args:
            num_classes: Number of classes K.
        """
        if num_classes == self.num_classes:
            return self
        lists = {key for key, x in self.loss_kwargs.items() if isinstance(x, (list, tuple))}
        options = {key: x for key, x in self.loss_kwargs.items() if key not in lists}
        loss = {"ce": "bce"}.get(self.loss, self.loss) if num_classes == 1 else {"bce": "ce"}.get(self.loss, self.loss)
        return dataclasses.replace(self, num_classes=num_classes, loss=loss, loss_kwargs=options)

    def backbone_options(self) -> dict[str, Any]:
        """Arguments of `TimmBackbone`: what is wanted of a plain ViT unless it was said."""
        blocks = {"levels": find_head(self.head).num_blocks} if self.pyramid in (None, "auto") else {}
        return {**blocks, **self.backbone_kwargs}


class Wiring(NamedTuple):
    """How the parts of a plan go together on a backbone of given strides."""

    keep: int | None  # of the backbone's levels, the coarsest ones; None leaves them
    pyramid_kwargs: dict[str, Any]
    level: int | None  # of the maps that the head takes; None: all


def choose_pyramid(head: str, strides: Sequence[float]) -> str | None:
    """The pyramid that fits a head and a backbone: the table in `create_model`."""
    kind = find_head(head)
    if len(strides) == 1:
        return "simple" if kind.multi_level else None
    if len(set(strides)) == 1 and not kind.multi_level:
        return None  # several blocks of a plain ViT: the last one
    return kind.preferred_pyramid


def wire(plan: ModelPlan, strides: Sequence[float]) -> Wiring:
    """How a plan's parts go together on a backbone of these strides."""
    kind, keep = find_head(plan.head), None
    level = None if kind.multi_level else -1 if plan.pyramid is None else 0
    if plan.backbone_kwargs.get("levels") is None:
        keep = 1 if level == -1 and not plan.auxiliary_weight else kind.max_levels
    options: dict[str, Any] = {"stride": strides[-1]} if plan.pyramid == "simple" else {}
    if level == 0:
        options["num_outputs"] = 1  # the finest is all that the head takes
    return Wiring(keep, {**options, **plan.pyramid_kwargs}, level)


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
