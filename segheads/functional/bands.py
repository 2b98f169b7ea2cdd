"""Parts of an image in Python threads that each compute with one core, in an order that does not change bits.

A pass over tiles is hundreds of small operations. Where PyTorch shares each out among all cores, each waits for the
slowest of them, which on a busy machine takes longer than the arithmetic. Here a core works through whole parts by
itself, and what the parts add up to is added in their order, whatever the number of threads.

Where the caller's thread is bound to a core (OMP_PROC_BIND), they may use all cores of PyTorch's threads nevertheless.

The threads flush subnormal numbers (below 1.2e-38 in fp32) to zero: with them, such as a softmax's weights of far
tokens, processors compute up to a hundred times slower. The setting is a thread's own; the caller's stays as it is.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from threading import Barrier, Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
_PROCESS = os.getpid()
GRAIN = 32_768  # elements above which PyTorch wakes all its threads, which then wait busily for some milliseconds


def can_run_in_bands(*tensors: Tensor) -> bool:
    """Whether threads may compute with these tensors: real ones on the CPU that no tracer or mode of PyTorch watches.

    Modes and transforms belong to the caller's thread, and without OpenMP one number of cores holds for all threads.
    """
    return (
        all(type(x) is Tensor and x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and _has_own_number_of_cores()
    )


def run_parts(
    count: int, compute: Callable[[int], Part], add: Callable[[int, Part], None], tensors: Iterable[Tensor]
) -> None:
    """Call `compute` with 0, 1, ..., count - 1, and `add` with each number and result in that order.

    In threads, see `run_in_bands`, if these tensors allow it.
    """
    if can_run_in_bands(*tensors):
        run_in_bands(count, compute, add)
        return
    for index in range(count):
        add(index, compute(index))


def run_in_bands(count: int, compute: Callable[[int], Part], add: Callable[[int, Part], None]) -> None:
    """Call `compute` with 0, 1, ..., count - 1 in threads, and `add` with each number and result in that order.

    As many threads as `torch.get_num_threads()` says in the caller's work, each on one core. They record no gradients
    and know nothing of autocast; inference mode is the caller's. The first error of `compute` or `add` is raised here.
    """
    is_inference = torch.is_inference_mode_enabled()
    queue = _Queue(count, compute, add)

    def work() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            queue.work()

    num_threads = torch.get_num_threads()
    pool = _pool(num_threads, os.getpid())  # a forked process has none of its parent's threads
    wait([pool.submit(work) for _ in range(min(num_threads, count))])
    if queue.error is not None:
        raise queue.error


class _Queue:
    """Numbers to be computed, and results that wait for their turn to be added."""

    def __init__(self, count: int, compute: Callable[[int], Part], add: Callable[[int, Part], None]) -> None:
        self.count, self.compute, self.add = count, compute, add
        self.lock, self.next, self.added = Lock(), 0, 0
        self.waiting: dict[int, Part] = {}
        self.error: BaseException | None = None

    def work(self) -> None:
        """Compute what no other thread has begun, until nothing is left or one has failed."""
        try:
            while (number := self._take()) is not None:
                part = self.compute(number)
                with self.lock:
                    self.waiting[number] = part
                    del part
                    while self.added in self.waiting:
                        self.add(self.added, self.waiting.pop(self.added))
                        self.added += 1
        except BaseException as error:
            with self.lock:
                self.error = self.error or error

    def _take(self) -> int | None:
        with self.lock:
            if self.error is not None or self.next == self.count:
                return None
            self.next += 1
            return self.next - 1


@lru_cache(maxsize=1)
def _pool(num_threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads that are all set up: one that is later would meet the caller's next settings, or a fork."""
    pool, settings, all_there = ThreadPoolExecutor(num_threads, "segheads"), Lock(), Barrier(num_threads)
    cores = _cores_of_all(num_threads)

    def start() -> None:
        with settings:
            if cores:
                with contextlib.suppress(OSError):  # a sandbox may forbid it
                    os.sched_setaffinity(0, cores)
            _compute_alone()
        all_there.wait()

    try:
        futures = [pool.submit(start) for _ in range(num_threads)]
    except RuntimeError:  # no more threads to be had
        all_there.abort()
        raise
    wait(futures)
    return pool


def _cores_of_all(num_threads: int) -> set[int]:
    """The cores of PyTorch's threads, where the caller's has fewer, as have those that it starts; else none."""
    if not hasattr(os, "sched_setaffinity") or len(cores := os.sched_getaffinity(0)) >= num_threads:
        return set()
    if os.getpid() == _PROCESS:  # one that was forked may wait for ever for the others' threads
        torch.ones(8 * GRAIN).add_(1)  # starts them
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(task.name))
    return cores


def _compute_alone() -> None:
    """Set the thread up: one core, no subnormal numbers.

    The number of cores is the thread's own, but what is set last is also the number of threads that start later; a
    thread that ends at once sets that back.
    """
    before = torch.get_num_threads()  # of a new thread: what such threads start with
    torch.set_num_threads(1)
    other = Thread(target=torch.set_num_threads, args=(before,))
    other.start()
    other.join()
    torch.set_flush_denormal(True)


@lru_cache(maxsize=1)
def _has_own_number_of_cores() -> bool:
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
