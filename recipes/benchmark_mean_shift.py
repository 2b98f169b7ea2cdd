"""Memory and time of one mean shift, forward and backward: ours against the plain formula.

    python recipes/benchmark_mean_shift.py
    python recipes/benchmark_mean_shift.py --device cuda --dtype bfloat16

Prints a Markdown table. Each measurement has a process of its own, those of memory and time apart. Peak memory is what
comes on top of tokens, weights and the gradient that arrives, so it holds the result and the gradients of tokens and
weights; seconds are the quickest of the repeats. The plain formula makes several (N, N) matrices; where they do not fit
it is left out.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from segheads.functional import mean_shift

MATRICES = 4  # of N x N elements that the plain formula holds at once, in the softmax' backward


@dataclass(frozen=True)
class Config:
    """What to measure."""

    tokens: tuple[int, ...] = (4096, 8192, 16384)
    channels: int = 512
    shift_channels: int | None = None  # D; None means as many as channels
    batch_size: int = 1
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int | None = None  # of the CPU; None means all
    repeats: int = 3
    only: Literal["ours", "plain"] | None = None  # one measurement in this process, printed as JSON


def main(config: Config) -> None:
    """Measure and print the table."""
    if config.only:
        print(json.dumps(measure(config, config.only, config.tokens[0])))
        return
    D = config.shift_channels or config.channels
    print(
        f"{config.channels} channels shifted by {D}, batch size {config.batch_size}, {config.dtype}, {config.device}\n"
    )
    print("| tokens | ours: MB | growth | s | plain: MB | growth | s | plain/ours: memory | time |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    before: dict[str, float] = {}
    for tokens in config.tokens:
        ours = run(config, "ours", tokens)
        plain = run(config, "plain", tokens) if fits(config, tokens) else None
        cells = [f"{tokens:,}", *describe(ours, before.get("ours"))]
        if plain is None:
            cells += ["does not fit", "", "", "", ""]
        else:
            ratios = [f"{plain[key] / ours[key]:.2f}" for key in ("megabytes", "seconds")]
            cells += [*describe(plain, before.get("plain")), *ratios]
        print(f"| {' | '.join(cells)} |", flush=True)
        before = {"ours": ours["megabytes"]} | ({"plain": plain["megabytes"]} if plain else {})


def describe(result: dict[str, float], before: float | None) -> list[str]:
    """Cells of one result: memory, its growth over the row above, seconds."""
    growth = "" if before is None else f"x {result['megabytes'] / before:.2f}"
    return [f"{result['megabytes']:,.0f}", growth, f"{result['seconds']:.2f}"]


def run(config: Config, name: Literal["ours", "plain"], tokens: int) -> dict[str, float]:
    """`measure` twice, each in a process of its own: once for the memory, once for the time."""
    # glibc else keeps freed blocks of up to 32 MB, which count as memory in use; a fixed limit gives them back, slowly.
    exact = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if config.device == "cpu" else {}
    memory = in_own_process(replace(config, only=name, tokens=(tokens,), repeats=1), exact)
    speed = in_own_process(replace(config, only=name, tokens=(tokens,)), {})
    return {"megabytes": memory["megabytes"], "seconds": speed["seconds"]}


def in_own_process(config: Config, environment: dict[str, str]) -> dict[str, float]:
    """What `measure` gives in a new process with these variables."""
    arguments: list[str] = []
    for key, value in vars(config).items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"--{key.replace('_', '-')}", *map(str, values)]
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment).stdout
    result: dict[str, float] = json.loads(output)
    return result


def measure(config: Config, name: Literal["ours", "plain"], tokens: int) -> dict[str, float]:
    """Return the peak memory in MB above the input, and the seconds, of a forward and a backward pass."""
    if config.threads:
        torch.set_num_threads(config.threads)
    function = {"ours": mean_shift, "plain": plain_mean_shift}[name]
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    D, C = config.shift_channels or config.channels, config.channels
    weight = (torch.randn(D, C, generator=generator) * C**-0.5).to(**options).requires_grad_()
    x = torch.randn(config.batch_size, tokens, C, generator=generator).to(**options).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).to(**options)
    step(function, x[:, :64].detach().requires_grad_(), weight, grad[:, :64])  # loads kernels
    seconds = []
    before = reset_peak(config.device)
    for _ in range(config.repeats):
        x.grad = weight.grad = None
        start = time.perf_counter()
        step(function, x, weight, grad)
        if config.device != "cpu":
            torch.cuda.synchronize(config.device)
        seconds.append(time.perf_counter() - start)
    return {"megabytes": (peak(config.device) - before) / 1e6, "seconds": min(seconds)}


def step(function: Any, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """One forward and one backward pass."""
    function(x, weight).backward(grad)


def plain_mean_shift(x: Tensor, weight: Tensor) -> Tensor:
    """The formula as it is written, with PyTorch's own gradients."""
    r = x @ weight.T
    return (r @ r.mT * len(weight) ** -0.5).softmax(-1) @ x


def reset_peak(device: str) -> int:
    """Forget the peak so far; return the bytes in use."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux only; elsewhere what loading libraries took may hide some of the peak
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    """Return the highest number of bytes in use so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fits(config: Config, tokens: int) -> bool:
    """Whether the plain formula's matrices fit into the memory that is free."""
    size = torch.empty((), dtype=getattr(torch, config.dtype)).element_size()
    if config.device == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = torch.cuda.mem_get_info(config.device)[0]
    return MATRICES * config.batch_size * tokens**2 * size < free


if __name__ == "__main__":
    main(tyro.cli(Config))
