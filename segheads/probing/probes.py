"""Probes: heads at a learning rate each, on one frozen backbone."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.optim import Optimizer

from segheads.model import SegmentationModel
from segheads.plan import HeadChoice
from segheads.probing.backbone import BackboneView, SharedBackbone, unite
from segheads.training.machine import is_convolutional


@dataclass
class Probe:
    """One head at one learning rate, on a shared backbone.

    Attributes:
        choice: The head.
        learning_rate: Its rate at the start of the decay.
        model: Pyramid and head behind a view of the shared backbone; its own parameters are theirs alone.
        prepared: The model as Accelerate prepared it.
        optimizer: Of the model's parameters alone.
        diverged_at: The iteration at which its loss was no longer finite; from there on it rests.
    """

    choice: HeadChoice
    learning_rate: float
    model: SegmentationModel
    prepared: Any = None
    optimizer: Optimizer | None = None
    diverged_at: int | None = None

    @staticmethod
    def name_of(choice: HeadChoice, learning_rate: float) -> str:
        """Head and learning rate, in words."""
        return f"{choice} at {learning_rate:g}"

    @property
    def name(self) -> str:
        """Head and learning rate, in words."""
        return self.name_of(self.choice, self.learning_rate)

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.=+-]+", "_", self.name)


def build_probes(
    create: Callable[[HeadChoice], SegmentationModel],
    choices: Sequence[HeadChoice],
    learning_rates: Sequence[float],
    *,
    seed: int,
    channels_last: bool | None = None,
    leave_out: Callable[[HeadChoice, ValueError], bool] | None = None,
) -> tuple[SharedBackbone, list[Probe]]:
    """Build every head at every learning rate, and the one backbone that all share.

    Each head starts from the weights that it would have in a model of its own: the random state is seeded before each
    is built. A head's weights are the same for all learning rates.

    Args:
        create: Builds the model of a choice; all of one backbone, and with random weights drawn before the head's.
        choices: The heads.
        learning_rates: The rates that each of them learns with.
        seed: Of the initial weights.
        channels_last: Keep maps and weights in PyTorch's channels-last memory format; None does so where the backbone
            is made of convolutions.
        leave_out: Told of a head that does not fit the backbone, and why: whether to go on without it.

    Raises:
        ValueError: If there are no heads or no rates, one is given twice, or a head cannot be built; the message names
            it.
    """
    if not choices or not learning_rates:
        raise ValueError(f"needs one head and one learning rate or more; got {len(choices)} and {len(learning_rates)}")
    names = [Probe.name_of(choice, rate) for choice in choices for rate in learning_rates]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"each head and each learning rate may be given once; got {twice[0]} twice")
    backbone: Any = None
    built, views = [], []
    for choice in choices:
        set_seed(seed)
        try:
            model: Any = create(choice)
        except ValueError as error:
            if leave_out is not None and leave_out(choice, error):
                continue
            raise ValueError(f"head {choice}: {error}") from error
        backbone = backbone or model.backbone
        built.append((choice, model))
        views.append(BackboneView(model.backbone))
        model.backbone = views[-1]  # only the first one's weights are kept
    if not built:
        raise ValueError(f"none of the {len(choices)} heads fits the backbone")
    unite(backbone, views)
    channels_last = is_convolutional(backbone) if channels_last is None else channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shared = SharedBackbone(backbone.to(memory_format=memory_format), channels_last=channels_last)
    probes = [
        Probe(choice, rate, copy.deepcopy(model).to(memory_format=memory_format))
        for choice, model in built
        for rate in learning_rates
    ]
    for probe in probes:
        view: Any = probe.model.backbone
        view.attach(shared)
    return shared, probes
