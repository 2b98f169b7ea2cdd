"""How `recipes/benchmark` measures: peaks of memory, calls that take turns, and what the machine could do at best."""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]
SHORTEST = 0.1  # seconds for which a quick call is repeated within its turn
# glibc else keeps freed blocks of up to 32 MB, which count as memory in use; a fixed limit gives them back, slowly:
# for processes that measure memory, not for those that measure time.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def memory_of(call: Call, device: str) -> dict[str, int]:
    """Bytes that one call adds at its peak, and what the whole process then holds.

    On the CPU the process' resident memory, on a GPU what PyTorch's allocator hands out. What the call returns is alive
    at the peak and counts.
    """
    before = _reset_peak(device)
    result = call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    highest = _peak(device)
    del result
    return {"extra": highest - before, "whole": highest}


def seconds_in_turns(calls: Mapping[str, Call], turns: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each turn: first, second, ..., first, second, ...; each has been called once before."""
    gc.collect()
    gc.freeze()  # libraries hold so many objects that to look through them takes longer than many a call
    repeats = {name: max(1, round(SHORTEST / _seconds(call, 1, device))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            gc.collect()
            seconds[name].append(_seconds(call, repeats[name], device))
    return seconds


def _seconds(call: Call, repeats: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _reset_peak(device: str) -> int:
    """Give back what is free, forget the peak so far, return the bytes in use."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux only; elsewhere what loading libraries took may hide some of the peak
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _peak(device)


def _peak(device: str) -> int:
    """Return the highest number of bytes in use so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: str) -> int:
    """Memory that nothing uses."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the page cache would give back counts as free
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_that_fits(fits: Callable[[int], bool], precision: float = 0.02) -> int:
    """The largest number for which `fits` holds, to a precision, by doubling and halving; 0 if not even 1 does."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low * precision):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def machine(device: str) -> str:
    """Name the processor, the threads, the versions and the GPU."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        name = names[0] if names else name
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    parts = [f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB", f"torch {torch.__version__}"]
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        parts.insert(0, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return ", ".join(parts)


def seconds_at_best(work: Mapping[str, float], device: str, dtype: torch.dtype = torch.float32) -> float | None:
    """How long this machine needs at least: the slowest of bytes, flops and element-wise operations, each at its rate.

    Rates are measured on the spot: copies of a large buffer, a large matrix product or convolution, and `exp` and
    `maximum` on buffers that stay in the cache. On a GPU only bytes and flops are looked at.
    """
    kinds = {name: amount for name, amount in work.items() if name in RATES and (device == "cpu" or name in ON_GPU)}
    return max((amount / RATES[name](device, dtype) for name, amount in kinds.items()), default=None)


def _bytes_per_second(device: str, _dtype: torch.dtype) -> float:
    source = torch.zeros(2**25, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _quickest(lambda: target.copy_(source), device)


def _flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a matrix product or a convolution: which library is the quicker one depends on the processor."""
    n, C, side = ON_CPU if device == "cpu" else (8192, 1024, 128)
    a = torch.ones(n, n, device=device, dtype=dtype)
    x = torch.ones(1, C, side, side, device=device, dtype=dtype)
    kernel = torch.ones(C, C, 3, 3, device=device, dtype=dtype)
    product = 2 * n**3 / _quickest(lambda: a @ a, device)
    return max(product, 18 * (C * side) ** 2 / _quickest(lambda: F.conv2d(x, kernel, padding=1), device))


def _elements_per_second(operation: Callable[..., Tensor], count: int) -> float:
    """Of an element-wise operation, on buffers of 128 kB for each thread."""
    size = 2**15 * torch.get_num_threads()  # the number of elements from which PyTorch calls all threads
    inputs, out = [torch.rand(size) for _ in range(count)], torch.empty(size)

    def call() -> None:
        for _ in range(50):
            operation(*inputs, out=out)

    return 50 * size / _quickest(call, "cpu")


def _quickest(call: Call, device: str) -> float:
    seconds = [_seconds(call, 1, device)]
    while len(seconds) < 8 and sum(seconds) < 10:  # a processor without 16-bit products takes ten seconds for each
        seconds.append(_seconds(call, 1, device))
    return min(seconds)


ON_CPU = (1536, 256, 64)  # side of the matrices; channels and side of the convolution
ON_GPU = ("bytes", "flops")
RATES: dict[str, Callable[[str, torch.dtype], float]] = {
    "bytes": _bytes_per_second,
    "flops": _flops_per_second,
    "exponentials": lambda *_: _elements_per_second(torch.exp, 1),
    "comparisons": lambda *_: _elements_per_second(torch.maximum, 2),
}
