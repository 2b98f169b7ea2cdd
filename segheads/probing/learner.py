"""Many heads on one frozen backbone, as the training loop sees them: one learner."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from segheads.data import PhotometricNormalize
from segheads.modules import start_training
from segheads.probing.backbone import SharedBackbone
from segheads.probing.features import FeatureCache
from segheads.probing.probes import Probe
from segheads.training.batches import training_batches
from segheads.training.clipping import ClipMode
from segheads.training.loop import first_not_finite, train_step
from segheads.training.optimization import set_learning_rate

FeatureBatch = tuple[list[Tensor], Tensor]  # the maps of a batch and its labels (B, H, W)


def feature_batches(
    accelerator: Accelerator,
    loader: Iterable[dict[str, Any]],
    prepare: PhotometricNormalize,
    shared: SharedBackbone,
    *,
    cache: FeatureCache | None = None,
    channels_last: bool = False,
) -> Iterator[FeatureBatch]:
    """Maps and labels of what the loader hands over; the backbone runs once for each batch that no cache holds.

    Args:
        accelerator: Tells device and precision.
        loader: Yields collated `TrainingSamples`, or what `CachedSamples` makes of them.
        prepare: The backbone's normalisation.
        shared: The backbone.
        cache: Where maps come from and go to.
        channels_last: Show the backbone images in that memory format.
    """

    def maps_of(images: Tensor) -> list[Tensor]:
        with accelerator.autocast():
            return shared.compute(images)

    if cache is None:
        for images, labels in training_batches(loader, prepare, channels_last=channels_last):
            yield maps_of(images), labels
        return
    for batch in loader:
        if "maps" in batch:
            yield batch["maps"], batch["labels"].long()
            continue
        ((images, labels),) = training_batches([batch], prepare, channels_last=channels_last)
        maps = maps_of(images)
        cache.save(batch["keys"].tolist(), maps, labels.to(batch["labels"].dtype))
        yield maps, labels


def probe_step(
    accelerator: Accelerator,
    shared: SharedBackbone,
    probes: Sequence[Probe],
    batches: Sequence[FeatureBatch],
    *,
    seed: int,
    max_grad_norm: float | None = None,
    clip_mode: ClipMode = "norm",
) -> list[Tensor]:
    """One update of every head, each as if it were the only one.

    A head has its own optimizer and its own clipping, and before its turn the random state is seeded, so that neither
    the other heads nor their order change what it drops. One head's activations are freed before the next one's turn.

    Args:
        accelerator: What prepared the heads and their optimizers.
        shared: The backbone whose views they have.
        probes: The heads; one that has diverged rests.
        batches: Maps and labels; the gradients of several are averaged (gradient accumulation).
        seed: Of what is dropped in this step.
        max_grad_norm: Clip the norm of each head's gradient to this.
        clip_mode: What is clipped instead.

    Returns:
        The loss of each head, NaN of one that rests: scalars on the device, for which nothing waits.
    """
    shared.forget()
    for maps, _ in batches:
        shared.remember(maps)
    # of the images only size and kind are looked at, now that their maps are known
    shown = [(torch.zeros((), device=y.device).expand(len(y), 3, *y.shape[1:]), y) for _, y in batches]
    losses = []
    for probe in probes:
        if probe.diverged_at is not None or probe.optimizer is None:
            losses.append(torch.full((), torch.nan, device=accelerator.device))
            continue
        shared.rewind()
        torch.manual_seed(seed)
        clipping: Any = {"max_grad_norm": max_grad_norm, "clip_mode": clip_mode}
        losses.append(train_step(accelerator, probe.prepared, probe.optimizer, shown, **clipping))
    shared.forget()
    return losses


def step_seed(seed: int, process: int, iteration: int) -> int:
    """The seed of what is dropped in one iteration of one process: nothing of it need be kept for a resumed run."""
    return int(np.random.SeedSequence([seed, process, iteration]).generate_state(1, np.uint32)[0])


class ProbeLearner:
    """All heads, each with its own optimizer; one whose loss or weights are no longer finite rests, the others go on.

    Args:
        accelerator: What prepared the heads and their optimizers.
        shared: The backbone whose views they have.
        probes: The heads; those in evaluation mode are put into training mode.
        schedule: Learning rate as a function of the number of updates made and a head's own rate.
        seed: Of what is dropped.
        max_grad_norm: Clip the norm of each head's gradient to this.
        clip_mode: What is clipped instead.
        records: What the log of a resumed run holds: who rests already.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        shared: SharedBackbone,
        probes: Sequence[Probe],
        *,
        schedule: Callable[[int, float], float],
        seed: int,
        max_grad_norm: float | None = None,
        clip_mode: ClipMode = "norm",
        records: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.accelerator, self.shared, self.probes = accelerator, shared, probes
        self.schedule, self.seed, self.max_grad_norm = schedule, seed, max_grad_norm
        self.clip_mode = clip_mode
        for record in records:
            for probe in probes:
                probe.diverged_at = record.get("diverged", {}).get(probe.name, probe.diverged_at)
        for probe in probes:
            start_training(probe.model)

    def step(self, iteration: int, batches: Sequence[FeatureBatch]) -> Tensor:
        """One update of every head at its rate; returns a loss for each, NaN of one that rests."""
        for probe in self.probes:
            if probe.optimizer is not None:
                set_learning_rate(probe.optimizer, self.schedule(iteration, probe.learning_rate))
        drawn = step_seed(self.seed, self.accelerator.process_index, iteration)
        clipping: Any = {"max_grad_norm": self.max_grad_norm, "clip_mode": self.clip_mode}
        losses = probe_step(self.accelerator, self.shared, self.probes, batches, seed=drawn, **clipping)
        return torch.stack(losses)

    def record(self, iteration: int, means: Sequence[float], first_bad: Sequence[int | None]) -> dict[str, Any]:
        """The loss of every head that learns, and who has diverged since the last record and when."""
        diverged = {}
        for probe, bad in zip(self.probes, self._first_bad(iteration, first_bad), strict=True):
            if probe.diverged_at is None and bad is not None:
                probe.diverged_at = diverged[probe.name] = bad
        learning = {p.name: x for p, x in zip(self.probes, means, strict=True) if p.diverged_at is None}
        return {"loss": learning, **({"diverged": diverged} if diverged else {})}

    def _first_bad(self, iteration: int, losses: Sequence[int | None]) -> list[int | None]:
        """When each head was first not finite, in its loss or its weights, in any process."""
        own = [
            iteration if bad is None and probe.diverged_at is None and first_not_finite(probe.model) else bad
            for probe, bad in zip(self.probes, losses, strict=True)
        ]
        marks = torch.tensor([[bad or 0 for bad in own]], device=self.accelerator.device)
        latest = self.accelerator.gather(marks).amax(0).tolist()  # processes differ in whether, never in when
        return [bad or None for bad in latest]
