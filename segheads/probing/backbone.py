"""A frozen backbone that is run once for many heads, and how each head sees it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from segheads.backbones import TimmBackbone


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


class BackboneView(nn.Module):
    """What a head's model takes for its backbone: its own levels of the shared one, without any weights."""

    take: Callable[[Tensor], list[Tensor]]  # a method and not the module: weights and mode stay with that

    def __init__(self, own: TimmBackbone) -> None:
        super().__init__()
        self.name, self.in_chans, self.data_config = own.name, own.in_chans, own.data_config
        self.indices, self.strides, self.channels = own.indices, own.strides, own.channels

    def attach(self, shared: SharedBackbone) -> None:
        """Look at a shared backbone that gives these levels, and perhaps others.

        Args:
            shared: The backbone.
        """
        self.take = shared.take
        self.places = [shared.backbone.indices.index(index) for index in self.indices]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of the head's own levels, fine to coarse."""
        maps = self.take(images)
        return [maps[place] for place in self.places]


def unite(backbone: TimmBackbone, views: Sequence[BackboneView]) -> None:
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
