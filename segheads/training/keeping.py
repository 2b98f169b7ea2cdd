"""What a run keeps beside its checkpoints: the best model by a score, an average of the weights, when to stop."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from segheads.errors import OptionError
from segheads.metrics import METRICS
from segheads.ranges import Range

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KeepingConfig:
    """Which weights a run ends with."""

    best: str | None = None
    """A score of the evaluations, such as mIoU: model/ is that of the evaluation where it is highest, the one at the
    end included; the last one's without. Checkpoints then hold the best weights, too."""
    keep: Literal["best", "last"] | None = None
    """Which of them model/ is of; None means best where there is one."""
    ema: Annotated[float | None, Range(0, 1, above=True, below=True)] = None
    """Average the weights (timm's ModelEmaV3): the average's share that each update leaves, 0.9998 or so; at update n
    1 - n^(-3/4) where that is less. Evaluations and model/ are of the average."""
    patience: Annotated[int | None, Range(1)] = None
    """End the run after so many evaluations without a higher `best`."""

    def check(self, evaluate_every: int) -> None:
        """Refuse what does not fit.

        Args:
            evaluate_every: Iterations between evaluations, 0 for none.

        Raises:
            OptionError: Says what.
        """
        names = list(METRICS["iou"].scores)
        if self.best is not None and self.best not in names:
            raise OptionError(f"best {self.best!r} is no score of the evaluations; known are {', '.join(names)}")
        if self.best is None and self.keep == "best":
            raise OptionError("keep best needs a score to judge by, got best None; give best mIoU or another")
        if self.patience is None:
            return
        if self.best is None or not evaluate_every:
            raise OptionError(
                f"patience {self.patience} needs a score and evaluations on the way, got best {self.best} and "
                f"evaluate_every {evaluate_every}"
            )


class Keeper:
    """A learner around another one, which averages its weights and keeps the best ones.

    Checkpoints of the accelerator hold its state, once `register` was called.

    Args:
        config: What to keep.
        model: What is trained, on its device and not yet prepared.
        accelerator: What connects the processes.
    """

    def __init__(self, config: KeepingConfig, model: nn.Module, accelerator: Accelerator) -> None:
        self.config, self.model, self.accelerator = config, model, accelerator
        self.average = None if config.ema is None else ModelEmaV3(model, config.ema, use_warmup=True, warmup_power=0.75)
        self.learner: Any = None
        self.best_score: float | None = None
        self.best_iteration = self.waited = 0
        self.judged: int | None = 0  # the last evaluation heard of; None where an older checkpoint does not say
        self.best_weights: dict[str, Tensor] = {}

    def around(self, learner: Any) -> "Keeper":
        """The learner to train.

        Args:
            learner: Makes the updates.
        """
        self.learner = learner
        return self

    def register(self) -> None:
        """Let checkpoints hold the state; where nothing is kept they have none."""
        if self.average is not None or self.config.best is not None:
            self.accelerator.register_for_checkpointing(self)

    @property
    def stops(self) -> bool:
        """Whether `patience` is at its end."""
        return self.config.patience is not None and self.waited >= self.config.patience

    def step(self, iteration: int, batches: Sequence[Any]) -> Tensor:
        """One update of the learner, and of the average."""
        losses: Tensor = self.learner.step(iteration, batches)
        if self.average is not None:
            self.average.update(self.model, step=iteration + 1)
        return losses

    def record(self, iteration: int, means: Sequence[float], first_bad: Sequence[int | None]) -> dict[str, Any]:
        """The learner's."""
        record: dict[str, Any] = self.learner.record(iteration, means, first_bad)
        return record

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model has the average's weights within, where there is one, the same in all processes."""
        if self.average is None:
            yield
            return
        trained = _copied(self.model)
        self._average_into_model()
        try:
            yield
        finally:
            self.model.load_state_dict(trained)

    def judge(self, iteration: int, scores: Mapping[str, Any]) -> bool:
        """Hear of an evaluation; keep the weights if it is the best one.

        Args:
            iteration: Number of updates made.
            scores: By name; NaN is worse than any number.

        Returns:
            Whether the run ends here.
        """
        self.judged = iteration
        if self.config.best is None or iteration == self.best_iteration:
            return self.stops
        score = scores[self.config.best]
        if score > (float("-inf") if self.best_score is None else self.best_score):
            self.best_score, self.best_iteration, self.waited = score, iteration, 0
            with self.evaluated():
                self.best_weights = _copied(self.model, device="cpu")
        else:
            self.waited += 1
            if self.stops:
                log.info(
                    "the run ends at iteration %d: %d evaluations without a %s above %.4f, that of iteration %d",
                    *(iteration, self.waited, self.config.best, self.best_score or 0.0, self.best_iteration),
                )
        return self.stops

    def has_missed(self, iteration: int, evaluate_every: int) -> bool:
        """Whether a checkpoint is of the end of a run that became longer, whose last evaluation it knows nothing of.

        Args:
            iteration: Of the checkpoint.
            evaluate_every: Iterations between evaluations.
        """
        is_due = evaluate_every > 0 and iteration % evaluate_every == 0
        return self.config.best is not None and is_due and self.judged is not None and self.judged < iteration

    def finish(self, iteration: int) -> int:
        """Give the model the weights that the run ends with.

        Args:
            iteration: Number of updates made.

        Returns:
            The iteration that they are of.
        """
        averaged = "" if self.average is None else f", averaged over updates (ema {self.config.ema:g})"
        if self.config.keep != "last" and self.best_score is not None:
            self.model.load_state_dict(self.best_weights)
            score = f"{self.config.best} {self.best_score:.4f}"
            log.info("model/ is of iteration %d, the best: %s%s", self.best_iteration, score, averaged)
            return self.best_iteration
        if self.average is not None:
            self._average_into_model()
            log.info("model/ is of iteration %d%s", iteration, averaged)
        return iteration

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "best": {"score": self.best_score, "iteration": self.best_iteration, "waited": self.waited},
            "best_weights": self.best_weights,
            "judged": self.judged,
            "average": {} if self.average is None else self.average.module.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's.

        Args:
            state: What `state_dict` gave.
        """
        self.best_score, self.best_iteration, self.waited = state["best"].values()
        self.best_weights = state["best_weights"]
        self.judged = state.get("judged")
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])

    def _average_into_model(self) -> None:
        assert self.average is not None
        self.model.load_state_dict(self.average.module.state_dict())
        for buffer in self.model.buffers():  # statistics of batch norms are each process' own
            broadcast(buffer)


def _copied(model: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """The weights, apart from the model."""
    return {key: value.detach().to(device, copy=True) for key, value in model.state_dict().items()}
