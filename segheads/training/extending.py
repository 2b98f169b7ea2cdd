"""A finished run that goes on: more iterations in the same folder."""

import logging
from typing import TypeVar

from segheads.errors import OptionError, RunError
from segheads.training.config import TrainingConfig, changed
from segheads.training.optimization import OptimizationConfig
from segheads.training.resuming import stored
from segheads.training.run_folder import CONFIG, RunFolder

C = TypeVar("C", bound=TrainingConfig)
log = logging.getLogger(__name__)


def extended(config: C) -> tuple[C, int | None]:
    """The configuration of a run that `extend` makes longer: resumed, and of so many iterations in all.

    What the options say of `iterations` is passed over, so that the command of the run needs `--extend` alone. The same
    command once more goes on after a kill.

    Args:
        config: Numbers of the run; without `extend` it comes back as it is.

    Returns:
        The configuration, and the length of the run until now; None where nothing is to be made longer any more.

    Raises:
        OptionError: There is no run in `output`, or `extend` is not above its length.
        RunError: The run's config.json is damaged.
    """
    if config.extend is None:
        return config, None
    before = stored(config.output)
    if not before:
        raise OptionError(f"extend {config.extend} goes on with a finished run, and {config.output} holds none")
    length = before.get("iterations")
    if not isinstance(length, int):
        raise RunError(f"{config.output / CONFIG} says no number of iterations; bring it back, or use another folder")
    is_begun = before.get("extend") == config.extend == length
    if config.extend <= length and not is_begun:
        raise OptionError(
            f"extend is the number of all iterations, so more than the {length} of {config.output}; got {config.extend}"
        )
    return changed(config, iterations=config.extend, resume=True), None if is_begun else length


def refuse_unfinished(folder: RunFolder, done: int, length: int) -> None:
    """Refuse to make a run longer that has not come to its end: it is at a rate of the shorter one.

    Args:
        folder: Of the run.
        done: The iteration of its last whole checkpoint.
        length: Its iterations until now.

    Raises:
        OptionError: It is not finished, or its last checkpoint is damaged.
    """
    if done < length:
        raise OptionError(
            f"extend goes on with a finished run, and {folder.path} is at iteration {done} of {length}: resume "
            "finishes it, unless its patience has ended it for good"
        )


def tell_of_extension(optimization: OptimizationConfig, length: int, iterations: int) -> None:
    """Say what rate the longer run begins with.

    Args:
        optimization: Of the run.
        length: Iterations of the run until now.
        iterations: Of the longer run.
    """
    last, first = optimization.rate_at(length - 1, length), optimization.rate_at(length, iterations)
    log.info(
        "the run of %d iterations goes on to %d: the learning rate, %.3g at its end, goes on from %.3g as %s has it "
        "over %d iterations",
        *(length, iterations, last, first, optimization.schedule, iterations),
    )
