"""The training loop that recipes share."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from segheads.data import PhotometricNormalize
from segheads.training.optimization import set_learning_rate
from segheads.training.run_folder import RunFolder, check_finite

Batch = tuple[Tensor, Tensor]


def training_batches(
    loader: Iterable[dict[str, Tensor]], prepare: PhotometricNormalize, *, channels_last: bool = False
) -> Iterator[Batch]:
    """Distort and normalise what `TrainingSamples` hands over, on the device that it is on.

    Where `prepare` is on a GPU, the copies that the loader makes and the distortion have a stream of their own: the GPU
    does them while it still computes the step before.

    Args:
        loader: Yields collated `TrainingSamples`, on the device of `prepare`.
        prepare: The backbone's normalisation.
        channels_last: Yield images in PyTorch's channels-last memory format, for a model that is in it.

    Shape:
        Yields images `(B, 3, H, W)`, float32, and labels `(B, H, W)`, int64.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def prepared() -> Iterator[Batch]:
        for batch in loader:
            images = prepare(batch["image"], batch["distortion"], batch["valid"])
            yield images.contiguous(memory_format=memory_format), batch["labels"].long()

    return _beside_the_step(prepared(), prepare.scale.device)


def _beside_the_step(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Make batches on a stream of their own where the device is a GPU, and let the step's stream wait for each."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # which wrote what is used to make them
    while True:
        # The host asks as soon as it has queued a step, long before the GPU is through with it.
        with torch.cuda.stream(side):
            batch = next(batches, None)
        if batch is None:
            return
        step = torch.cuda.current_stream(device)
        step.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(step)  # or the side stream could write to its memory before the step has read it
        yield batch


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float | None = None,
) -> Tensor:
    """One update of the weights.

    Args:
        accelerator: What prepared the model and the optimizer.
        model: `model(images, labels)` gives the loss.
        optimizer: Makes one step.
        batches: Images and labels; the gradients of several are averaged (gradient accumulation).
        max_grad_norm: Clip the norm of the gradient to this.

    Returns:
        The loss, averaged over `batches`: a scalar without gradient, on the device, for which nothing waits.
    """
    total = torch.zeros((), device=accelerator.device)
    for number, (images, labels) in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            loss = model(images, labels) / len(batches)
            accelerator.backward(loss)
            total += loss.detach()
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    run: RunFolder,
    *,
    schedule: Callable[[int], float],
    start: int,
    iterations: int,
    batch_size: int,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    log_every: int = 50,
    checkpoint_every: int = 1000,
    evaluate_every: int = 0,
    evaluate: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Train from iteration `start` to `iterations`, with a progress bar, a log, evaluations and checkpoints.

    Nothing in the loop waits for the device but the log, every `log_every` iterations. It is there that a loss that was
    not finite ends the run, naming the iteration at which it first was; checkpoints follow that check.

    Args:
        accelerator: What prepared model and optimizer.
        model: `model(images, labels)` gives the loss.
        optimizer: Its learning rate is set before each step.
        batches: Yields `accumulation` pairs of images and labels for each iteration.
        run: Where records and checkpoints go.
        schedule: Learning rate as a function of the number of updates made.
        start: Number of updates made before.
        iterations: Number of updates of the whole run.
        batch_size: Images of one update over all processes, for the log.
        accumulation: Batches of one update in each process.
        max_grad_norm: Clip the norm of the gradient to this.
        log_every: Iterations between records.
        checkpoint_every: Iterations between checkpoints; there is one at the end, too.
        evaluate_every: Iterations between evaluations; 0 means none.
        evaluate: Gives the values to log.

    Raises:
        FloatingPointError: If a loss or a weight is not finite; the last checkpoint is good.
    """
    meter = _LossMeter(accelerator, start)
    bar = tqdm(total=iterations, initial=start, unit="it", disable=not accelerator.is_main_process, dynamic_ncols=True)
    model.train()
    for iteration in range(start, iterations):
        rate = schedule(iteration)
        set_learning_rate(optimizer, rate)
        step = [next(batches) for _ in range(accumulation)]
        meter.add(train_step(accelerator, model, optimizer, step, max_grad_norm=max_grad_norm))
        bar.update()
        done = iteration + 1
        evaluates = evaluate is not None and evaluate_every > 0 and done % evaluate_every == 0 and done < iterations
        saves = done % checkpoint_every == 0 or done == iterations
        if done % log_every == 0 or evaluates or saves:
            loss, seconds, count = meter.read(done)
            record = {"loss": loss, "learning_rate": rate, "images_per_second": batch_size * count / seconds}
            _log(accelerator, run, done, record)
            shown = {"loss": f"{loss:.3f}", "lr": f"{rate:.2e}", "img/s": f"{record['images_per_second']:.1f}"}
            bar.set_postfix(shown)
            if evaluates and evaluate is not None:
                values = evaluate()
                _log(accelerator, run, done, values)
                bar.write(f"iteration {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            if saves:
                check_finite(model, done)
                run.save(accelerator, done)
            meter.restart_clock()
    bar.close()


def _log(accelerator: Accelerator, run: RunFolder, iteration: int, values: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        run.log({"iteration": iteration, **values})
    accelerator.log(values, step=iteration)


class _LossMeter:
    """Mean loss since the last reading, and the first iteration whose loss was not finite, kept on the device."""

    def __init__(self, accelerator: Accelerator, start: int) -> None:
        self.accelerator = accelerator
        self.total = torch.zeros((), device=accelerator.device)
        self.first_bad = torch.zeros((), dtype=torch.long, device=accelerator.device)  # 0: none
        self.done = self.last_read = start
        self.restart_clock()

    def add(self, loss: Tensor) -> None:
        self.done += 1
        self.first_bad = torch.where((self.first_bad == 0) & ~loss.isfinite(), self.done, self.first_bad)
        self.total = self.total + loss

    def read(self, iteration: int) -> tuple[float, float, int]:
        """Mean loss, seconds and number of iterations since the last reading."""
        count = iteration - self.last_read
        bad = self.accelerator.gather(self.first_bad.view(1))
        if bad.any():
            first = bad[bad > 0].min().item()
            raise FloatingPointError(
                f"the loss was not finite at iteration {first}; the run stopped, and its last checkpoint is from before"
            )
        mean = self.accelerator.reduce(self.total / count, reduction="mean").item()
        self.total, self.last_read = torch.zeros_like(self.total), iteration
        return mean, max(time.perf_counter() - self.since, 1e-9), count

    def restart_clock(self) -> None:
        self.since = time.perf_counter()
