"""Loss, label map and mean shift on a CPU that others use, too: ours against the published way, in turns.

    python recipes/benchmark/busy.py
    python recipes/benchmark/busy.py --load 0 2 4 --turns 5

Starts its own load: processes that multiply matrices on one core each. Prints a Markdown table with a row for each size
and load: seconds of ours divided by the published way's, the median over turns. What else the machine does counts, too.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any

import plain
import torch
from measure import machine, seconds_in_turns
from torch import Tensor

from segheads.cli.run import run
from segheads.evaluation.tables import markdown_table
from segheads.functional import mean_shift, upsample_argmax, upsample_cross_entropy
from segheads.ranges import Range

# classes, batch, grid, pixels, standard deviation of logits: at 60 neighbouring cells are sure of different classes
SIZES = [
    (150, 8, (32, 32), (512, 512), 1),
    (150, 8, (32, 32), (512, 512), 60),
    (150, 1, (32, 32), (512, 512), 1),
    (19, 1, (128, 256), (1024, 2048), 1),
    (2, 8, (128, 128), (512, 512), 1),
    (2, 1, (128, 128), (512, 512), 1),
]
TINY = [(5, 2, (4, 4), (32, 32), 1)]
# batch, tokens, channels of the tokens and of the space of distances: fused attention forward, and tiles
SHIFTS = [(2, 2304, 192, 192), (2, 2304, 192, 384)]
TINY_SHIFTS = [(2, 40, 8, 16)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    load: Annotated[tuple[int, ...], Range(0)] = (0, 2)
    """Numbers of other processes, each busy on one core."""
    turns: Annotated[int, Range(1)] = 5
    """Calls of each side in each row, in turns."""
    quick: bool = False
    """One tiny size, for tests."""


def main(config: Config) -> None:
    """Run the benchmark."""
    print(f"{machine('cpu')}, {torch.get_num_threads()} threads; ours / plain")
    rows = []
    for load in config.load:
        with busy(load):
            for num_classes, batch, grid, size, spread in TINY if config.quick else SIZES:
                name = f"{num_classes} classes, {grid[0]}x{grid[1]} to {size[0]}x{size[1]}, batch {batch}"
                name += f", logits {spread} times as far apart" if spread > 1 else ""
                loss, label_map = measure(num_classes, batch, grid, size, config.turns, spread)
                rows.append([name, str(load), f"{loss:.2f}", f"{label_map:.2f}", ""])
                print(f"{name}, {load} other processes: loss {loss:.2f}, label map {label_map:.2f}", file=sys.stderr)
            for shift in TINY_SHIFTS if config.quick else SHIFTS:
                name = f"{shift[1]} tokens of {shift[2]}, distances in {shift[3]}, batch {shift[0]}"
                ratio = measure_shift(*shift, config.turns)
                rows.append([name, str(load), "", "", f"{ratio:.2f}"])
                print(f"{name}, {load} other processes: mean shift {ratio:.2f}", file=sys.stderr)
    print(
        markdown_table(["size", "other processes", "loss and gradient", "label map", "mean shift and gradients"], rows)
    )


def measure(
    num_classes: int, batch: int, grid: tuple[int, int], size: tuple[int, int], turns: int, spread: float = 1
) -> list[float]:
    """Ours over the published way in seconds: of the loss with its gradient, and of the label map."""
    torch.manual_seed(0)
    logits = torch.randn(batch, num_classes, *grid).mul_(spread).requires_grad_()
    labels = torch.randint(0, num_classes, (batch, *size))

    def with_gradient(loss: Any) -> Tensor:
        return torch.autograd.grad(loss(logits, labels), logits)[0]

    losses = {side: partial(with_gradient, loss) for side, loss in SIDES["loss"].items()}
    maps = {side: partial(label_map, logits.detach(), size) for side, label_map in SIDES["label_map"].items()}
    return [ratio_of(calls, turns) for calls in (losses, maps)]


def measure_shift(batch: int, tokens: int, channels: int, width: int, turns: int) -> float:
    """Ours over the published formula in seconds: of a mean shift with its gradients."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, channels, requires_grad=True)
    weight = torch.randn(width, channels).div_(channels**0.5).requires_grad_()

    def with_gradients(shift: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(shift(x, weight).sum(), (x, weight))

    sides = {"plain": plain.mean_shift, "ours": mean_shift}
    return ratio_of({side: partial(with_gradients, shift) for side, shift in sides.items()}, turns)


def ratio_of(calls: Mapping[str, Any], turns: int) -> float:
    """Median seconds of ours over the plain side's, in turns."""
    for call in calls.values():
        call()
    seconds = seconds_in_turns(calls, turns, "cpu")
    return statistics.median(seconds["ours"]) / statistics.median(seconds["plain"])


SIDES: dict[str, dict[str, Any]] = {
    "loss": {"plain": plain.loss, "ours": upsample_cross_entropy},
    "label_map": {"plain": plain.label_map, "ours": upsample_argmax},
}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute without a break."""
    context = get_context("spawn")
    started, processes = context.Barrier(count + 1), []
    for _ in range(count):
        process = context.Process(target=work, args=(started,), daemon=True)
        process.start()
        processes.append(process)
    started.wait()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def work(started: Any) -> None:
    """Multiply matrices on one core for ever."""
    torch.set_num_threads(1)
    matrix = torch.rand(512, 512) / 512
    started.wait()
    while True:
        matrix = (matrix @ matrix).clamp_(0, 1)


if __name__ == "__main__":
    run(main, Config, description=__doc__)
