"""Losses and gradients that are not finite: which layer was the first, and steps that may be left out."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from segheads.data import SegmentationDataset, collate_samples
from segheads.data.rare_classes import RareClasses
from segheads.errors import OptionError
from segheads.model import SegmentationModel
from segheads.training.batches import explain_batch, keys_of_batch, normalization, training_batches, training_samples
from segheads.training.config import TrainingConfig

log = logging.getLogger(__name__)


class FiniteSteps:
    """Keeps weights from updates by what is not finite.

    Where none is tolerated nothing waits for the device: fused optimizers make no update from the first loss on that is
    not finite, so that the layer can be found once the log hears of it. Where some are tolerated, each step waits, an
    update by a loss or a gradient that is not finite is left out in all processes, and what its forward pass left in
    batch norms' statistics is undone.

    Args:
        accelerator: What prepared model and optimizer.
        model: As it was before that.
        optimizer: The prepared one.
        tolerated: How many steps of the whole run may be left out.
        explain: What is known of the batches of an iteration, in words.
        records: What the log of a resumed run holds: how many were left out before.

    Raises:
        OptionError: Some are tolerated, and precision is fp16, whose scaler leaves steps out by itself.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        *,
        tolerated: int = 0,
        explain: Callable[[int], str] | None = None,
        records: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        if tolerated and accelerator.scaler is not None:
            raise OptionError(
                "skip_nonfinite must be 0 with mixed_precision fp16, whose scaler skips steps by itself; got "
                f"{tolerated}"
            )
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.tolerated, self.explain = tolerated, explain
        self.skipped = max((record.get("skipped", 0) for record in records), default=0)
        self._is_fused = accelerator.scaler is None and bool(optimizer.optimizer.defaults.get("fused"))
        self._bad = torch.zeros((), device=accelerator.device)  # of the device: 1 from the first bad loss on
        self._iteration, self._left_out, self._refused = 0, False, False
        self._last = torch.zeros((), device=accelerator.device)  # loss that was finite
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, iteration: int) -> None:
        """Get ready for a step.

        Args:
            iteration: Number of updates made before.
        """
        self._iteration, self._left_out, self._refused = iteration, False, False
        if self.tolerated:
            self._buffers = _copied(self.model)

    def allows(self, loss: Tensor) -> bool:
        """Whether the optimizer is to make its step; to be called by every process.

        Args:
            loss: Of the step in this process, on the device; its gradients are the parameters'.
        """
        if not self.tolerated and not self._is_fused:
            return True
        bad = (~loss.isfinite()).float()
        if self.tolerated:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            bad = torch.maximum(bad, (~torch.stack(torch._foreach_norm(gradients)).isfinite().all()).float())
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        if not self.tolerated:
            self._bad = torch.maximum(self._bad, bad.clamp(max=1))
            self.optimizer.optimizer.found_inf = self._bad  # the kernels' own way to leave out a step
            return True
        if not bad.item():
            self._last = loss
            return True
        _restore(self._buffers)
        self._left_out = self.skipped < self.tolerated
        if self._left_out:
            self.skipped += 1
            why = f", {self.explain(self._iteration + 1)}" if self.explain else ""
            log.warning(
                "iteration %d is left out, its loss or gradient is not finite%s; %d of %d that are tolerated",
                *(self._iteration + 1, why, self.skipped, self.tolerated),
            )
        self._refused = not self._left_out
        return False

    def counted(self, loss: Tensor) -> Tensor:
        """The loss of the step, as the log counts it: that of the last step where this one was left out.

        It is NaN, which ends the run, where a step too many was not finite, be it in its gradient alone.

        Args:
            loss: As it was.
        """
        if self._refused:
            return torch.full_like(loss, torch.nan)
        return self._last if self._left_out else loss

    def record(self) -> dict[str, int]:
        """What the log keeps: how many steps of the run were left out."""
        return {"skipped": self.skipped} if self.skipped else {}


def explain_failure(
    accelerator: Accelerator,
    config: TrainingConfig,
    dataset: SegmentationDataset,
    model: SegmentationModel,
    iteration: int,
    *,
    rare: RareClasses | None = None,
) -> str:
    """What is known of an iteration whose loss is not finite: labels that are no class, or layer and images.

    Args:
        accelerator: Tells device and precision.
        config: Numbers of the run.
        dataset: The training set.
        model: With the weights that it had then.
        iteration: Number of the update, from 1 on.
        rare: As in `training_loader`.
    """
    words = explain_batch(config, dataset, iteration, rare=rare)
    if not words.startswith("whose"):
        return words
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return words  # an update was made before the log heard of it: every layer is infinite now
    samples, prepare = training_samples(config, dataset, model.data_config["mean"]), normalization(model)
    parts = (
        {name: x.to(accelerator.device) for name, x in collate_samples([samples[key] for key in keys]).items()}
        for keys in keys_of_batch(config, dataset, iteration, rare=rare)
    )
    found = None
    for images, labels in training_batches(parts, prepare.to(accelerator.device)):
        with accelerator.autocast():
            found = found or first_layer_not_finite(model, images, labels)
    return f"first in {found}, {words}" if found else words


@torch.no_grad()
def first_layer_not_finite(model: nn.Module, images: Tensor, labels: Tensor) -> str | None:
    """The name of the layer whose output is the first that is not finite, or None.

    Statistics and random states are as before afterwards.

    Args:
        model: `model(images, labels)` gives the loss.
        images: `(B, C, H, W)`.
        labels: `(B, H, W)`.
    """
    if not images.isfinite().all():
        return "the images"
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and not _is_finite(output):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    buffers = _copied(model)
    try:
        with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
            loss = model.forward(images, labels)  # not the compiled call
    finally:
        _restore(buffers)
        for handle in handles:
            handle.remove()
    return found[0] if found else None if _is_finite(loss) else "the loss"


def _copied(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers, such as the statistics of batch norms, and what they hold."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


def _restore(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def _is_finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, Mapping):
        return all(map(_is_finite, output.values()))
    return not isinstance(output, Sequence) or isinstance(output, str) or all(map(_is_finite, output))
