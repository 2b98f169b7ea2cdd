"""Progress in the form that fits its reader: a bar on a terminal, drawn once a second; elsewhere a line a minute."""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from typing_extensions import Self

log = logging.getLogger(__name__)
BAR_EVERY, LINE_EVERY = 1.0, 60.0  # seconds


class Progress:
    """How far a piece of work is: a context in which lines of the log do not break the bar.

    Args:
        name: What is counted, such as `"iteration"`.
        total: How many there are.
        initial: How many were done before.
        is_shown: False in processes that say nothing.
        leave: Whether the last state of the bar stays on the terminal.

    Examples:
        >>> with Progress("image", 2) as progress:
        ...     progress.update()
        ...     progress.line()
        'image 1 of 2 (0:00:00 left)'
    """

    def __init__(self, name: str, total: int, *, initial: int = 0, is_shown: bool = True, leave: bool = True) -> None:
        self.name, self.total, self.initial, self.done = name, total, initial, initial
        on_terminal = is_shown and sys.stderr is not None and sys.stderr.isatty()
        self.says_lines = is_shown and not on_terminal
        self._bar: Any = tqdm(
            total=total,
            initial=initial,
            desc=name,
            disable=not on_terminal,
            mininterval=BAR_EVERY,
            dynamic_ncols=True,
            leave=leave,
        )
        self._redirect: AbstractContextManager[None] = nullcontext()
        if on_terminal:
            heard = [logger for logger in (logging.getLogger(), logging.getLogger("segheads")) if logger.handlers]
            self._redirect = logging_redirect_tqdm(heard)
        self._values: dict[str, str] = {}
        self._began = self._said = time.perf_counter()

    def __enter__(self) -> Self:
        self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirect.__exit__(kind, error, trace)
        self._bar.close()

    def update(self) -> None:
        """One more is done."""
        self.done += 1
        self._bar.update()
        if self.says_lines and time.perf_counter() - self._said >= LINE_EVERY:
            self._say()

    def show(self, values: Mapping[str, str]) -> None:
        """What is known by now; the first time, and of the last one, it is said at once.

        Args:
            values: Words by name.
        """
        is_first, self._values = not self._values, dict(values)
        self._bar.set_postfix(self._values, refresh=False)
        if self.says_lines and (is_first or self.done == self.total):
            self._say()

    def line(self) -> str:
        """How far it is, how long it takes on, and what is known, in one line."""
        count = max(self.done - self.initial, 1)
        left = round((time.perf_counter() - self._began) / count * (self.total - self.done))
        known = ", ".join(f"{name} {value}" for name, value in self._values.items())
        return f"{self.name} {self.done} of {self.total} ({timedelta(seconds=left)} left)" + (known and f": {known}")

    def _say(self) -> None:
        log.info(self.line())
        self._said = time.perf_counter()
