"""What all trainings of a grid have in common."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import tyro

from segheads.ranges import Range
from segheads.training.config import TrainingConfig

T = TypeVar("T")


def axis(default: T) -> T:
    """A field of a `GridConfig` that says which trainings to make, and so is no part of any one of them.

    Args:
        default: The field's default, of a type that cannot change.
    """
    return field(default=default, metadata={"axis": True})


@dataclass(frozen=True, kw_only=True)
class GridConfig(TrainingConfig):
    """What all trainings of a grid have in common, and which of them to make.

    A recipe's `Config` inherits it, and declares its own axes as `name: type = axis(default)`.
    """

    tables: tuple[str, ...] = axis(())
    """Which tables to make; none means all."""
    seeds: Annotated[int, Range(1)] = axis(1)
    """Trainings of each cell that is made more than once, from `seed` on."""
    shard: str = axis("0/1")
    """Which share of the trainings to make: 1/4 is the second of four processes, each on a GPU of its own."""
    render_only: bool = axis(False)
    """Make the tables of what is there, and train nothing."""
    extend: Annotated[int | None, tyro.conf.Suppress] = None
    resume: Annotated[bool, tyro.conf.Suppress] = True
    """A sweep always goes on with what `output` holds."""
    model_kwargs: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Further arguments of `create_model`; dicts among them are merged with those that other fields stand for."""

    def as_json(self) -> dict[str, Any]:
        """The configuration of one training: everything but the axes."""
        axes = {f.name for f in dataclasses.fields(self) if f.metadata.get("axis")}
        return {key: value for key, value in super().as_json().items() if key not in axes}

    def model_options(self, num_classes: int | None = None) -> dict[str, Any]:
        """The arguments of `create_model` that fields stand for, with `model_kwargs`."""
        return merge(super().model_options(num_classes), self.model_kwargs)

    def summary(self) -> str:
        """Data set, backbone and length of the trainings, in words."""
        model, loop, optimization = self.model, self.loop, self.optimization
        weights = "pretrained" if model.backbone_weights or model.pretrained else "from random weights"
        sides = {"patch": model.patch_size, "depth": model.depth, "crop": self.crop_size}
        sizes = "".join(f", {name} {size}" for name, size in sides.items() if size is not None)
        return (
            f"{self.data.dataset}, {model.backbone} {weights}{sizes}, {loop.iterations:,} iterations of "
            f"{loop.batch_size} images, {optimization.optimizer} at {optimization.learning_rate:g}"
        )


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The second over the first, and dicts in both likewise."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
