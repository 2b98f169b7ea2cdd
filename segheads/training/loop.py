"""The training loop: one model, or many probes, is what a learner makes of it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from segheads.errors import DivergedError
from segheads.evaluation.tables import SHOWN, named
from segheads.model import SegmentationModel
from segheads.modules import start_training
from segheads.progress import Progress
from segheads.training.batches import Batch
from segheads.training.clipping import ClipMode, clip_gradients
from segheads.training.config import LoopConfig
from segheads.training.machine import memory_in_use
from segheads.training.nonfinite import FiniteSteps
from segheads.training.optimization import set_learning_rate
from segheads.training.setup import Run

log = logging.getLogger(__name__)
MAX_SKIPPED = 20  # steps in a row that fp16 may skip for a loss that is not finite


class Learner(Protocol):
    """What `train` trains: it makes updates, and says of them what the log keeps."""

    def step(self, iteration: int, batches: Sequence[Any]) -> Tensor:
        """Make one update.

        Args:
            iteration: Number of updates made before.
            batches: What one update is made of: one batch, or several parts of it.

        Returns:
            Losses `(n,)` without gradient, on the device; nothing waits for them.
        """

    def record(self, iteration: int, means: Sequence[float], first_bad: Sequence[int | None]) -> dict[str, Any]:
        """What the log keeps, every `log_every` iterations and before each checkpoint.

        Args:
            iteration: Number of updates made.
            means: Mean of each loss since the last record, over all processes.
            first_bad: The first iteration at which each loss was not finite, in any process; None: it always was.

        Returns:
            JSON values, dicts among them; `loss` is shown beside the progress bar.

        Raises:
            DivergedError: If the run cannot go on; what was saved before is good.
        """


class ModelLearner:
    """One model and its optimizer.

    Args:
        accelerator: What prepared both.
        model: As `train_step` takes it; it is put into training mode if it is in evaluation mode, and
            otherwise its parts keep theirs, such as frozen batch norms.
        optimizer: Its learning rate is set before each step.
        schedule: Learning rate as a function of the number of updates made.
        max_grad_norm: Clip the norm of the gradient to this.
        clip_mode: What is clipped instead, see `clip_gradients`.
        explain: What is known of the batches of an iteration, in words, for the error of a loss that is not finite.
        finite: Keeps weights from updates by what is not finite.

    In fp16 the scaler skips a step whose forward pass overflowed, and what that left in batch norms' statistics is
    undone; more than `MAX_SKIPPED` of them in a row end the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        schedule: Callable[[int], float],
        max_grad_norm: float | None = None,
        clip_mode: ClipMode = "norm",
        explain: Callable[[int], str] | None = None,
        finite: FiniteSteps | None = None,
    ) -> None:
        start_training(accelerator.unwrap_model(model))
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.schedule, self.max_grad_norm, self.explain = schedule, max_grad_norm, explain
        self.clip_mode, self.finite = clip_mode, finite
        self._last = self._skipped = torch.zeros((), device=accelerator.device)
        self._statistics = list(_statistics(model).values()) if accelerator.scaler else []
        self._norms: list[Tensor] = []  # of the gradients since the last record, on the device
        self._terms: dict[str, Tensor] = {}  # of the loss: sum and number of finite values since then, (2,), likewise

    def step(self, iteration: int, batches: Sequence[Batch]) -> Tensor:
        """One update at the schedule's rate; returns the loss `(1,)`."""
        set_learning_rate(self.optimizer, self.schedule(iteration))
        terms: dict[str, Tensor] = {}
        options: dict[str, Any] = {
            "max_grad_norm": self.max_grad_norm,
            "clip_mode": self.clip_mode,
            "gradient_norms": self._norms,
            "terms": terms,
        }
        if self.finite is not None:
            self.finite.begin(iteration)
            options["may_step"] = self.finite.allows
        before = [buffer.clone() for buffer in self._statistics]
        loss = train_step(self.accelerator, self.model, self.optimizer, batches, **options)
        for buffer, old in zip(self._statistics, before, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, old))
        loss = loss if self.finite is None else self.finite.counted(loss)
        for name, value in terms.items():
            finite = value.isfinite()
            new = torch.stack([torch.where(finite, value, 0), finite.to(value.dtype)])
            self._terms[name] = self._terms[name] + new if name in self._terms else new
        return (loss if self.accelerator.scaler is None else self._without_overflows(loss))[None]

    def _without_overflows(self, loss: Tensor) -> Tensor:
        """The last finite loss where this one is not: the scaler of fp16 has skipped the step; not so for ever."""
        finite = loss.isfinite()
        self._skipped = torch.where(finite, 0, self._skipped + 1)
        self._last = torch.where(finite | (self._skipped > MAX_SKIPPED), loss, self._last)
        return self._last

    def record(self, iteration: int, means: Sequence[float], first_bad: Sequence[int | None]) -> dict[str, Any]:
        """Loss and learning rate; `terms`, of which a loss is made of several; the mean of gradients' finite norms.

        The norms are those before clipping, where gradients are clipped. Terms are means over processes, each before
        its factor.

        Raises:
            DivergedError: If the loss was, or a weight or a statistic is, not finite.
        """
        if first_bad[0] is not None:
            why = f", {words}" if self.explain and (words := self.explain(first_bad[0])) else ""
            raise DivergedError(
                f"the loss was not finite at iteration {first_bad[0]}{why}; the run stopped, and its last checkpoint "
                "is from before",
                first_bad[0],
            )
        if (name := first_not_finite(self.model)) is not None:
            message = f"{name} is not finite after iteration {iteration}; no checkpoint was written"
            raise DivergedError(message, iteration)
        skipped = {} if self.finite is None else self.finite.record()
        rate = self.schedule(iteration - 1)
        return {"loss": means[0], **self._mean_terms(), "learning_rate": rate, **self._gradient_norm(), **skipped}

    def _mean_terms(self) -> dict[str, dict[str, float]]:
        if not self._terms:
            return {}
        summed: Any = self.accelerator.reduce(torch.stack(list(self._terms.values())), reduction="sum")
        means = (summed[:, 0] / summed[:, 1]).tolist()  # NaN where none was finite
        names = list(self._terms)
        self._terms.clear()
        return {"terms": {name: mean for name, mean in zip(names, means, strict=True) if mean == mean}}

    def _gradient_norm(self) -> dict[str, float]:
        norms = torch.stack(self._norms) if self._norms else torch.zeros(0)
        self._norms.clear()
        finite = norms[norms.isfinite()]
        return {"gradient_norm": finite.mean().item()} if len(finite) else {}


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight, or statistic, that is not finite, or None; waits once where all are."""
    values = {**dict(model.named_parameters()), **_statistics(model)}
    if not values or torch.stack([x.detach().isfinite().all() for x in values.values()]).all():
        return None
    return next(name for name, value in values.items() if not value.isfinite().all())


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of batch norms, by name; a table of a model's own may hold infinities."""
    return {
        f"{name}.{key}".removeprefix("."): value
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key, value in (("running_mean", module.running_mean), ("running_var", module.running_var))
        if value is not None
    }


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float | None = None,
    clip_mode: ClipMode = "norm",
    gradient_norms: list[Tensor] | None = None,
    terms: dict[str, Tensor] | None = None,
    may_step: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """One update of the weights, the same whether its images are one batch, or parts of it here and in other processes.

    Args:
        accelerator: What prepared the model and the optimizer.
        model: `model(images, labels)` gives the loss. One with `divisors`, such as a `SegmentationModel`, also takes
            the shares of its loss's terms (see `update_shares`); of any other, parts are averaged.
        optimizer: Makes one step.
        batches: Images and labels of each part (gradient accumulation).
        max_grad_norm: Clip the norm of the gradient to this.
        clip_mode: What is clipped instead, see `clip_gradients`.
        gradient_norms: Receives the norm before it is clipped, a scalar on the device, where it is the norm.
        terms: Receives what the loss of a `SegmentationModel` is made of, likewise; see its `forward`.
        may_step: Is told the loss once the gradients are there; False leaves the optimizer's step out.

    Returns:
        The loss: a scalar without gradient, on the device, for which nothing waits; its mean over the processes is that
        of the update.
    """
    total = torch.zeros((), device=accelerator.device)
    shares = update_shares(accelerator, model, [labels for _, labels in batches])
    gives_terms = isinstance(accelerator.unwrap_model(model), SegmentationModel)
    for number, (images, labels) in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            own = () if shares is None else (shares[number - 1],)
            if terms is None or not gives_terms:
                loss = model(images, labels, *own)
            else:
                loss, of_part = model(images, labels, *own, with_terms=True)
                for name, value in of_part.items():
                    terms[name] = terms[name] + value if name in terms else value
            loss = loss / (len(batches) if shares is None else 1)
            accelerator.backward(loss)
            total += loss.detach()
    if max_grad_norm is not None:
        norm = clip_gradients(accelerator, model.parameters(), max_grad_norm, clip_mode)
        if gradient_norms is not None and norm is not None:
            gradient_norms.append(norm.detach())
    if may_step is None or may_step(total):
        optimizer.step()
    optimizer.zero_grad()
    return total


def update_shares(accelerator: Accelerator, model: nn.Module, labels: Sequence[Tensor]) -> Tensor | None:
    """The factors that make losses of the parts of an update add up to the loss of the whole.

    A loss over valid pixels divides by their number, and parts differ in it: their mean is not the loss of the whole.

    Args:
        accelerator: Connects the processes, over which gradients are averaged.
        model: Its `divisors`, as those of a `SegmentationModel`, say what each term of its loss divides by.
        labels: Of each part of the update in this process.

    Returns:
        Factors `(parts, terms)`; None where the update is one batch of one process, or the model has no divisors.
    """
    divisors = getattr(accelerator.unwrap_model(model), "divisors", None)
    if divisors is None or (len(labels) == 1 and accelerator.num_processes == 1):
        return None
    own = torch.stack([divisors(part).float() for part in labels])
    whole: Any = accelerator.reduce(own.sum(0), reduction="sum")
    return own * accelerator.num_processes / torch.where(whole > 0, whole, 1)


def train(
    run: Run,
    learner: Learner,
    batches: Iterator[Any],
    loop: LoopConfig,
    *,
    start: int = 0,
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    judge: Callable[[int, Mapping[str, Any]], bool] | None = None,
) -> int:
    """Train from iteration `start` to the end, with progress, a log, evaluations and checkpoints.

    Nothing in the loop waits for the device but the log, every `log_every` iterations, where the learner is told of a
    loss that was not finite; checkpoints follow that.

    Args:
        run: Its `accelerator`, and its `folder`, where records and checkpoints go.
        learner: What is trained.
        batches: Yields `gradient_accumulation` batches for each iteration.
        loop: Length of the run, and how often it logs, evaluates and keeps checkpoints.
        start: Number of updates made before.
        evaluate: Gives the values to log; not asked at the end.
        judge: Is told the iteration and what `evaluate` gave; True ends the run there, with a checkpoint.

    Returns:
        Number of updates made, those before included.

    Raises:
        DivergedError: If the learner cannot go on; the last checkpoint is good.
        StoppedError: After SIGTERM or SIGINT, once the step is done and a checkpoint written.
    """
    meter = _Meter(run.accelerator, start)
    main = run.accelerator.is_main_process
    with Progress("iteration", loop.iterations, initial=start, is_shown=main) as progress, run.stop.after_steps():
        for iteration in range(start, loop.iterations):
            with meter.waiting():
                step = [next(batches) for _ in range(loop.gradient_accumulation)]
            meter.add(learner.step(iteration, step))
            progress.update()
            done = iteration + 1
            evaluates = evaluate is not None and _is_due(done, loop.evaluate_every) and done < loop.iterations
            signal = run.stop.agreed_at_last() if done == loop.iterations else run.stop.agreed()
            saves = _is_due(done, loop.checkpoint_every) or done == loop.iterations or signal > 0
            if not (_is_due(done, loop.log_every) or evaluates or saves):
                continue
            ends = False
            means, first_bad, seconds, count = meter.read(done)
            try:
                record = learner.record(done, means, first_bad)
            except DivergedError as error:
                kept = f"(iteration {run.folder.latest()} in {run.folder.checkpoints})"
                raise DivergedError(f"{error} {kept}", error.iteration) from error
            record["images_per_second"] = loop.batch_size * count / seconds
            record |= {"data_wait": meter.waited / seconds, "memory_gb": memory_in_use(run.accelerator.device)}
            run.log(done, record)
            progress.show(_shown(record))
            if evaluates and evaluate is not None:
                values = evaluate()
                run.log(done, values)
                log.info("iteration %d: %s", done, _words(values))
                ends = judge is not None and judge(done, values)
            if saves or ends:
                run.folder.save(run.accelerator, done)
            if signal:
                raise run.stop.error(signal, f" after iteration {done} of {loop.iterations}")
            if ends:
                return done
            meter.restart_clock()
    return max(start, loop.iterations)


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _words(values: Mapping[str, Any]) -> str:
    """Scores in one line, and how many classes they leave out."""
    numbers = [f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float)]
    absent = values.get("absent_classes")
    return (", ".join(numbers) or "evaluated") + (f"; mIoU without {named(absent, SHOWN)}" if absent else "")


def _shown(record: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside the progress bar."""
    loss = record["loss"]
    shown = {"learning": str(len(loss))} if isinstance(loss, Mapping) else {"loss": f"{loss:.3f}"}
    if "learning_rate" in record:
        shown["learning rate"] = f"{record['learning_rate']:.2e}"
    return {
        **shown,
        "images/s": f"{record['images_per_second']:.1f}",
        "waiting for data": f"{100 * record['data_wait']:.0f} %",
        "memory": f"{record['memory_gb']:.1f} GB",
    }


class _Meter:
    """Mean of each loss since the last reading, and when each was first not finite, kept on the device."""

    def __init__(self, accelerator: Accelerator, start: int) -> None:
        self.accelerator = accelerator
        self.total = torch.zeros(1, device=accelerator.device)
        self.first_bad = torch.zeros(1, dtype=torch.long, device=accelerator.device)  # 0: none
        self.done = self.last_read = start
        self.restart_clock()

    def add(self, losses: Tensor) -> None:
        self.done += 1
        self.first_bad = torch.where((self.first_bad == 0) & ~losses.isfinite(), self.done, self.first_bad)
        self.total = self.total + losses

    def read(self, iteration: int) -> tuple[list[float], list[int | None], float, int]:
        """Means, first bad iterations, and seconds and number of iterations since the last reading."""
        count = iteration - self.last_read
        bad = self.accelerator.gather(self.first_bad[None])  # (processes, losses)
        never = torch.iinfo(torch.long).max
        first = torch.where(bad == 0, never, bad).amin(0).tolist()
        means = self.accelerator.reduce(self.total / count, reduction="mean").tolist()
        self.total, self.last_read = torch.zeros_like(self.total), iteration
        seconds = max(time.perf_counter() - self.since, 1e-9)
        return means, [None if when == never else when for when in first], seconds, count

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done within is waiting for the next batches."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def restart_clock(self) -> None:
        self.since, self.waited = time.perf_counter(), 0.0
