"""Many heads on one frozen backbone, which is run once for all of them."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from segheads.backbones import TimmBackbone
from segheads.errors import SavedModelError
from segheads.files import write_json
from segheads.model import SegmentationModel
from segheads.plan import HeadChoice
from segheads.saving import read_model, restore_settings, settings_of, write_weights
from segheads.training.run import is_convolutional

BACKBONE_FILE, HEAD_FILE, HEAD_CONFIG_FILE = "backbone.safetensors", "head.safetensors", "config.json"


class SharedBackbone(nn.Module):
    """A frozen backbone whose maps are computed once and given to every head.

    It stays in evaluation mode, without gradients. Heads see it through views that look like a backbone of their own:
    after `rewind()` their first call gets the maps of the first batch that was computed since `forget()`, the second
    those of the second, and a call for which there are none yet computes them.

    Args:
        backbone: A backbone that gives every map that some head wants.
        channels_last: Hand maps over in PyTorch's channels-last memory format.
    """

    def __init__(self, backbone: TimmBackbone, *, channels_last: bool = False) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.channels_last = channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._seen: list[list[Tensor]] = []
        self._next = 0
        self.eval()

    def train(self, mode: bool = True) -> "SharedBackbone":  # noqa: ARG002
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def compute(self, images: Tensor) -> list[Tensor]:
        """The maps of the images, fine to coarse, without gradients and in the memory format of all maps."""
        with torch.no_grad():
            return [x.contiguous(memory_format=self._memory_format) for x in self.backbone(images)]

    def forget(self) -> None:
        """Start anew: other images come."""
        self._seen, self._next = [], 0

    def remember(self, maps: Sequence[Tensor]) -> None:
        """Keep the maps of one more batch, for the heads' next call.

        Args:
            maps: What `compute` gave, perhaps long ago.
        """
        self._seen.append([x.contiguous(memory_format=self._memory_format) for x in maps])

    def rewind(self) -> None:
        """Start again with the first batch since `forget()`: the next head's turn."""
        self._next = 0

    def take(self, images: Tensor) -> list[Tensor]:
        """The maps of the next batch; of the images only the size is looked at where these are known."""
        if self._next == len(self._seen):
            self._seen.append(self.compute(images))
        self._next += 1
        return self._seen[self._next - 1]


class _View(nn.Module):
    """What a head's model takes for its backbone: its own levels of the shared one, without any weights."""

    take: Callable[[Tensor], list[Tensor]]  # a method and not the module: weights and mode stay with that

    def __init__(self, own: TimmBackbone) -> None:
        super().__init__()
        self.name, self.in_chans, self.data_config = own.name, own.in_chans, own.data_config
        self.indices, self.strides, self.channels = own.indices, own.strides, own.channels

    def attach(self, shared: SharedBackbone) -> None:
        self.take = shared.take
        self.places = [shared.backbone.indices.index(index) for index in self.indices]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.take(images)
        return [maps[place] for place in self.places]


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
        views.append(_View(model.backbone))
        model.backbone = views[-1]  # only the first one's weights are kept
    if not built:
        raise ValueError(f"none of the {len(choices)} heads fits the backbone")
    _unite(backbone, views)
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


def _unite(backbone: TimmBackbone, views: Sequence[_View]) -> None:
    """Let a backbone give every level that some view wants."""
    levels = {
        index: (stride, channels)
        for view in views
        for index, stride, channels in zip(view.indices, view.strides, view.channels, strict=True)
    }
    backbone.indices = sorted(levels)
    backbone.strides = [levels[index][0] for index in backbone.indices]
    backbone.channels = [levels[index][1] for index in backbone.indices]
    padding = math.lcm(*backbone.strides)
    for view in views:
        if math.lcm(*view.strides) != padding:
            raise ValueError(
                f"heads on strides {backbone.strides} and on {view.strides} alone cannot share {backbone.name}: it "
                f"pads their images to multiples of {padding} and of {math.lcm(*view.strides)}; probe them apart"
            )


def save_probes(folder: str | Path, shared: SharedBackbone, probes: Sequence[Probe]) -> None:
    """Write the backbone once, and the weights of every head in a folder of its own, for `join_head`.

    Args:
        folder: Where to; heads go to `heads/NAME`.
        shared: The backbone.
        probes: Heads from `create_model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / BACKBONE_FILE, shared.backbone)
    for probe in probes:
        own = folder / "heads" / probe.slug
        own.mkdir(parents=True, exist_ok=True)
        if probe.model.plan is None:
            raise ValueError(f"head {probe.name} was assembled from parts; only one of create_model can be saved")
        write_weights(own / HEAD_FILE, probe.model)
        about = {
            "name": probe.name,
            "learning_rate": probe.learning_rate,
            "model": dataclasses.asdict(probe.model.plan),
            "settings": settings_of(probe.model),
        }
        write_json(own / HEAD_CONFIG_FILE, about)


def join_head(folder: str | Path, slug: str) -> SegmentationModel:
    """Join a head that `save_probes` wrote to its backbone again.

    Args:
        folder: The folder of the run.
        slug: Name of the head's folder in `heads`.

    Returns:
        The model, in evaluation mode and on the CPU, with `save_pretrained` and all else of `create_model`'s models.

    Raises:
        FileNotFoundError: If there is no such head; the message lists those that there are.
        ValueError: If the weights do not fit the model.
    """
    own = Path(folder) / "heads" / slug
    if not (own / HEAD_FILE).is_file():
        known = sorted(path.parent.name for path in Path(folder).glob(f"heads/*/{HEAD_FILE}"))
        raise FileNotFoundError(f"{folder} holds no head {slug!r}; it holds {', '.join(known) or 'none'}")
    about = json.loads((own / HEAD_CONFIG_FILE).read_text())
    model = SegmentationModel.from_plan(read_model(about["model"]))
    state = load_file(own / HEAD_FILE)
    state |= {f"backbone.{key}": value for key, value in load_file(Path(folder) / BACKBONE_FILE).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SavedModelError(f"{own / HEAD_FILE} and {BACKBONE_FILE} do not fit the model: {error}") from error
    restore_settings(model, about.get("settings", {}), own / HEAD_CONFIG_FILE)  # 0.1.0 kept none
    return model.eval()
