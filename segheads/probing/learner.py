"""Training and evaluation of many heads on one frozen backbone."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from segheads.data import PhotometricNormalize
from segheads.data.samples import EvaluationSamples
from segheads.evaluation.evaluate import evaluate_each
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.model import SegmentationModel
from segheads.probing.features import FeatureCache
from segheads.probing.probes import Probe, SharedBackbone
from segheads.training.loop import train_step, training_batches
from segheads.training.optimization import set_learning_rate
from segheads.training.run_folder import RunFolder

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
        cache.save(batch["keys"].tolist(), maps, batch["labels"])
        yield maps, labels


def probe_step(
    accelerator: Accelerator,
    shared: SharedBackbone,
    probes: Sequence[Probe],
    batches: Sequence[FeatureBatch],
    *,
    seed: int,
    max_grad_norm: float | None = None,
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
        losses.append(train_step(accelerator, probe.prepared, probe.optimizer, shown, max_grad_norm=max_grad_norm))
    shared.forget()
    return losses


def step_seed(seed: int, process: int, iteration: int) -> int:
    """The seed of what is dropped in one iteration of one process: nothing of it need be kept for a resumed run."""
    return int(np.random.SeedSequence([seed, process, iteration]).generate_state(1, np.uint32)[0])


def train_probes(
    accelerator: Accelerator,
    shared: SharedBackbone,
    probes: Sequence[Probe],
    batches: Iterator[FeatureBatch],
    run: RunFolder,
    *,
    schedule: Callable[[int, float], float],
    seed: int,
    start: int,
    iterations: int,
    batch_size: int,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    log_every: int = 50,
    checkpoint_every: int = 1000,
    evaluate_every: int = 0,
    evaluate: Callable[[], list[dict[str, float]]] | None = None,
) -> None:
    """Train all heads from iteration `start` to `iterations`, with a progress bar, a log, evaluations and checkpoints.

    A head whose loss or weights are no longer finite ends alone: it rests from the next record of the log on, which
    says when it was, and the others go on.

    Args:
        accelerator: What prepared the heads and their optimizers.
        shared: The backbone whose views they have.
        probes: The heads.
        batches: Yields `accumulation` pairs of maps and labels for each iteration.
        run: Where records and checkpoints go.
        schedule: Learning rate as a function of the number of updates made and a head's own rate.
        seed: Of what is dropped.
        start: Number of updates made before.
        iterations: Number of updates of the whole run.
        batch_size: Images of one update over all processes, for the log.
        accumulation: Batches of one update in each process.
        max_grad_norm: Clip the norm of each head's gradient to this.
        log_every: Iterations between records.
        checkpoint_every: Iterations between checkpoints; there is one at the end, too.
        evaluate_every: Iterations between evaluations; 0 means none.
        evaluate: Gives the scores of each head.
    """
    for record in run.records():
        for probe in probes:
            probe.diverged_at = record.get("diverged", {}).get(probe.name, probe.diverged_at)
    meter = _LossMeter(accelerator, len(probes), start)
    bar = tqdm(total=iterations, initial=start, unit="it", disable=not accelerator.is_main_process, dynamic_ncols=True)
    for probe in probes:
        probe.model.train()
    for iteration in range(start, iterations):
        for probe in probes:
            if probe.optimizer is not None:
                set_learning_rate(probe.optimizer, schedule(iteration, probe.learning_rate))
        step = [next(batches) for _ in range(accumulation)]
        drawn = step_seed(seed, accelerator.process_index, iteration)
        meter.add(probe_step(accelerator, shared, probes, step, seed=drawn, max_grad_norm=max_grad_norm))
        bar.update()
        done = iteration + 1
        evaluates = evaluate is not None and evaluate_every > 0 and done % evaluate_every == 0 and done < iterations
        saves = done % checkpoint_every == 0 or done == iterations
        if done % log_every == 0 or evaluates or saves:
            losses, diverged, seconds, count = meter.read(done, probes)
            learning = {probe.name: x for probe, x in zip(probes, losses, strict=True) if probe.diverged_at is None}
            record = {"loss": learning, "images_per_second": batch_size * count / seconds}
            _log(accelerator, run, done, {**record, **({"diverged": diverged} if diverged else {})})
            bar.set_postfix({"heads": len(learning), "img/s": f"{record['images_per_second']:.1f}"})
            if evaluates and evaluate is not None:
                named = zip(probes, evaluate(), strict=True)
                values = {probe.name: x for probe, x in named if probe.diverged_at is None}
                _log(accelerator, run, done, {"scores": values})
            if saves:
                run.save(accelerator, done)
            meter.restart_clock()
    bar.close()


def evaluate_probes(
    accelerator: Accelerator,
    shared: SharedBackbone,
    probes: Sequence[Probe],
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
    metrics: Sequence[str] = ("iou",),
    batch_size: int = 8,
    limit: int | None = None,
    workers: int = 0,
) -> list[dict[str, Tensor]]:
    """What `evaluate` gives of each head, in one pass: the backbone sees each image, or each of its windows, once.

    Args:
        accelerator: Tells the process, the device and the precision.
        shared: The backbone whose views the heads have.
        probes: The heads; their mode is restored afterwards.
        samples: What to evaluate on.
        protocol: How the heads are shown each image.
        metrics: What to measure, by the names of `segheads.metrics.METRICS`.
        batch_size: Windows in one call of the backbone.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.
    """

    def in_turn(models: Sequence[SegmentationModel]) -> Iterator[SegmentationModel]:
        shared.forget()
        for model in models:
            shared.rewind()
            yield model
        shared.forget()

    models = [probe.model for probe in probes]
    options: dict[str, Any] = {"metrics": metrics, "batch_size": batch_size, "limit": limit, "workers": workers}
    return evaluate_each(accelerator, models, samples, protocol, in_turn=in_turn, **options)


def _log(accelerator: Accelerator, run: RunFolder, iteration: int, values: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        run.log({"iteration": iteration, **values})
    flat: dict[str, float] = {}
    for key, value in values.items():
        for name, x in value.items() if isinstance(value, dict) else [("", value)]:
            for score, y in x.items() if isinstance(x, dict) else [("", x)]:
                flat["/".join(part for part in (key, score, name) if part)] = y
    accelerator.log(flat, step=iteration)


class _LossMeter:
    """Each head's mean loss since the last reading, and when it was first not finite, kept on the device."""

    def __init__(self, accelerator: Accelerator, count: int, start: int) -> None:
        self.accelerator = accelerator
        self.total = torch.zeros(count, device=accelerator.device)
        self.first_bad = torch.zeros(count, dtype=torch.long, device=accelerator.device)  # 0: none
        self.done = self.last_read = start
        self.restart_clock()

    def add(self, losses: Sequence[Tensor]) -> None:
        self.done += 1
        stacked = torch.stack(list(losses))
        self.first_bad = torch.where((self.first_bad == 0) & ~stacked.isfinite(), self.done, self.first_bad)
        self.total = self.total + stacked

    def read(self, iteration: int, probes: Sequence[Probe]) -> tuple[list[float], dict[str, int], float, int]:
        """Mean losses, who diverged since the last reading and when, seconds and number of iterations."""
        count = iteration - self.last_read
        for place, probe in enumerate(probes):
            finite = torch.stack([p.isfinite().all() for p in probe.model.parameters()]).all()
            if probe.diverged_at is None:
                self.first_bad[place] = torch.where(
                    (self.first_bad[place] == 0) & ~finite, iteration, self.first_bad[place]
                )
        bad = self.accelerator.gather(self.first_bad[None])  # (processes, heads)
        never = torch.iinfo(torch.long).max
        first = torch.where(bad == 0, never, bad).amin(0).tolist()
        diverged = {}
        for probe, when in zip(probes, first, strict=True):
            if probe.diverged_at is None and when < never:
                probe.diverged_at = diverged[probe.name] = when
        means = self.accelerator.reduce(self.total / count, reduction="mean").tolist()
        self.total, self.last_read = torch.zeros_like(self.total), iteration
        return means, diverged, max(time.perf_counter() - self.since, 1e-9), count

    def restart_clock(self) -> None:
        self.since = time.perf_counter()
