"""SIGTERM and SIGINT: a training finishes its step and keeps it; anything else ends at once, in one line."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from segheads.errors import SegheadsError, StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What SIGTERM and SIGINT ask for: an error at once, or within `after_steps` a mark that is looked at.

    Args:
        words: Gives what is left, for the message; without it that is left out.
    """

    def __init__(self, words: Callable[[], str] | None = None) -> None:
        self.words = words
        self.asked_for = 0  # the signal's number, in this process
        self._waits = False
        self._process = os.getpid()
        self._group: Any = None
        self._question: tuple[Any, torch.Tensor] | None = None  # to the other processes, in the step before

    def error(self, number: int, place: str = "") -> StoppedError:
        """The error that ends a run.

        Args:
            number: Of the signal.
            place: Where the run is.
        """
        left = f"; {self.words()}" if self.words else ""
        return StoppedError(f"stopped by {signal.Signals(number).name}{place}{left}", number)

    def handle(self, number: int, frame: Any) -> None:  # noqa: ARG002 (Python gives it)
        """Hear of a signal; a second one does not wait for the step.

        Args:
            number: Of the signal.
            frame: What was running.

        Raises:
            StoppedError: Outside of `after_steps`, or the second time.
        """
        if os.getpid() != self._process:  # a child that loads data: its parent sees to it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._waits and not self.asked_for:
            self.asked_for = number
            return
        raise self.error(number)

    @contextmanager
    def after_steps(self) -> Iterator[None]:
        """Wait for `agreed` or `agreed_at_last` to be asked; a step that fails after a signal was stopped by it."""
        self._waits = True
        try:
            yield
            if self.asked_for:  # while the last checkpoint was written, say
                raise self.error(self.asked_for)
        except RuntimeError as error:  # such as a process that loads images, which was sent the same signal
            if self.asked_for and not isinstance(error, SegheadsError):
                raise self.error(self.asked_for) from error
            raise
        finally:
            self._waits, self.asked_for, self._question = False, 0, None

    def agreed(self) -> int:
        """The signal that a process was sent, 0 for none; to be called by all of them after each step.

        Of several processes each hears of the others' signals in the step after, all in the same one; the answer is on
        its way meanwhile, so that neither host nor device waits for it.
        """
        if not _are_several():
            return self.asked_for
        before, self._question = self._question, self._ask()
        return _answer(before)

    def agreed_at_last(self) -> int:
        """The same after the last step, for which the others are waited for."""
        if not _are_several():
            return self.asked_for
        return max(_answer(self._question), _answer(self._ask()))

    def _ask(self) -> tuple[Any, torch.Tensor]:
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        flag = torch.tensor([self.asked_for])
        return distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True), flag


@contextmanager
def stopping(words: Callable[[], str] | None = None) -> Iterator[Stop]:
    """Hear SIGTERM and SIGINT within; in another thread than the main one, which alone may, nothing changes.

    Args:
        words: See `Stop`.

    Raises:
        StoppedError: See `Stop.handle`.
    """
    stop, before = Stop(words), {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_parent(worker: int) -> None:  # noqa: ARG001 (DataLoader gives it)
    """Put a process that loads data into a group of its own, which signals to its parent's do not reach.

    So the parent can finish its step after Ctrl-C or the SIGTERM of a scheduler. For `worker_init_fn` of a
    `DataLoader`.

    Args:
        worker: Its number.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _answer(question: tuple[Any, torch.Tensor] | None) -> int:
    if question is None:
        return 0
    work, flag = question
    work.wait()
    return int(flag)
