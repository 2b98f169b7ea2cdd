"""The rows of `recipes/benchmark`: what is measured, at which sizes, and the numbers to reach."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import work
from measure import largest_that_fits
from work import Setup, Work

from segheads.data import FolderDataset
from segheads.heads import HEADS

Measure = Literal["seconds", "extra", "whole", "largest"]
Device = Literal["cpu", "cuda"]
MATRICES = 4  # full-size tensors that the plain side holds at once: scores, their softmax, two gradients


@dataclass(frozen=True)
class Goal:
    """A ratio of ours to another side that is to be reached."""

    measure: Measure  # seconds of a call, bytes that it adds ("extra") or that its process holds ("whole"), batch size
    limit: float  # at most; of the largest batch: at least
    against: str = "plain"


@dataclass(frozen=True)
class Row:
    """One thing that both sides do."""

    name: str  # group/rest, what `--only` chooses by
    title: str
    build: Callable[[Setup], Work] | None = None
    seconds: Callable[[Setup, int], dict[str, list[float]]] | None = None  # instead of build, where memory is no matter
    largest: Callable[[Setup, str], tuple[int, str]] | None = None  # instead of build: a batch, why no larger one
    cpu: tuple[Goal, ...] = ()
    cuda: tuple[Goal, ...] = ()
    is_model: bool = False  # compiling it takes minutes
    needs: Callable[[Setup], float] = lambda _setup: 0.0  # bytes that the plain side takes, roughly
    dtype: str | None = None  # instead of the setup's
    devices: tuple[Device, ...] = ("cpu", "cuda")
    point: tuple[str, str, float] | None = None  # of a scaling plot: axis, line, value

    @property
    def group(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]


def rows(quick: bool = False) -> list[Row]:
    """All rows, in the order in which they are measured."""
    return [*_functions(quick), *_heads(), *_models(), *_scaling(quick)]


def choose(all_rows: Sequence[Row], only: Sequence[str], device: str) -> list[Row]:
    """The rows of these groups or names that run on a device.

    Raises:
        ValueError: If there is no such group or row, or none of them runs on the device.
    """
    for wanted in only:
        if not any(_is_within(row.name, wanted) for row in all_rows):
            groups = ", ".join(dict.fromkeys(row.group for row in all_rows))
            raise ValueError(f"no row or group is called {wanted!r}; groups: {groups}; rows: --list")
    chosen = [row for row in all_rows if not only or any(_is_within(row.name, wanted) for wanted in only)]
    here = [row for row in chosen if torch.device(device).type in row.devices]
    if not here:
        raise ValueError(f"none of {', '.join(row.name for row in chosen)} runs on {device}")
    return here


def _is_within(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(wanted + "/")


def _functions(quick: bool) -> list[Row]:
    small, large = ((4, 4), (32, 32)), ((4, 8), (32, 64))
    K, (grid, size) = (5, small) if quick else (150, ((32, 32), (512, 512)))
    wide_grid, wide = large if quick else ((128, 256), (1024, 2048))
    fine = (8, 8) if quick else (128, 128)
    tokens = 100 if quick else 16_384
    return [
        _loss("loss/150", 8, K, grid, size, (0.18, 0.015), (0.25, 0.02)),
        _loss("loss/19", 1, 19, wide_grid, wide, (0.4, 0.05)),
        _loss("loss/150_batch2", 2, K, grid, size),
        _label_map("label_map/150", 1, K, grid, size, (0.22, 0.05)),
        _label_map("label_map/150_stride4", 1, K, fine, size),
        _label_map("label_map/19", 1, 19, wide_grid, wide, (0.2, 0.1)),
        _shift("mean_shift/192", tokens, 192, (1.0, 0.05)),
        _shift("mean_shift/512", tokens, 512),
    ]


def _heads() -> list[Row]:
    forward = [
        Row(f"head_forward/{name}", f"{name} head, forward", partial(work.head, name=name, trains=False))
        for name in HEADS
    ]
    steps = [
        Row(f"head_step/{name}", f"{name} head with loss and backward", partial(work.head, name=name, trains=True))
        for name in HEADS
    ]
    return forward + steps


def _models() -> list[Row]:
    against_backbone = (Goal("seconds", 1.2, "backbone"), Goal("extra", 1.15, "backbone"))
    shifter = "MeanShifter ViT-Ti/16, 512, 150 classes"
    senformer = "training step, SenFormer ResNet-50, 512, 150 classes"
    return [
        Row(
            "step/mean_shift",
            f"training step, {shifter}, batch 2",
            partial(work.step, name="mean_shift", batch=2),
            cpu=(Goal("seconds", 0.6), Goal("whole", 0.6), *against_backbone),
            is_model=True,
        ),
        Row(
            "step/senformer",
            f"{senformer}, batch 2, one block repeated",
            partial(work.step, name="senformer", batch=2),
            cpu=(Goal("seconds", 0.45), Goal("extra", 0.35)),
            is_model=True,
            needs=lambda setup: 0 if setup.quick else 9e9,
        ),
        Row(
            "step/senformer_separate",
            f"{senformer}, batch 2, six blocks",
            partial(work.step, name="senformer", batch=2, shared_block=False),
            is_model=True,
            needs=lambda setup: 0 if setup.quick else 10e9,
        ),
        Row(
            "step/mean_shift_batch8",
            f"training step, {shifter}, batch 8",
            partial(work.step, name="mean_shift", batch=8),
            is_model=True,
            devices=("cuda",),
        ),
        Row(
            "step/senformer_batch8",
            f"{senformer}, batch 8, one block repeated",
            partial(work.step, name="senformer", batch=8),
            is_model=True,
            needs=lambda setup: 0 if setup.quick else 36e9,
            devices=("cuda",),
        ),
        Row(
            "step/mean_shift_batch16",
            f"training step, {shifter}, bf16, batch 16",
            partial(work.step, name="mean_shift", batch=16),
            cuda=(Goal("seconds", 0.6),),
            is_model=True,
            dtype="bfloat16",
            devices=("cuda",),
        ),
        Row(
            "largest_batch/mean_shift",
            f"largest batch, training step, {shifter}, bf16",
            largest=partial(_largest_batch, name="mean_shift"),
            cuda=(Goal("largest", 2.0),),
            dtype="bfloat16",
            devices=("cuda",),
        ),
        Row(
            "evaluation/683x512",
            "evaluation of a 683x512 image, windows 512/480, MeanShifter ViT-Ti/16, 150 classes",
            work.evaluation,
            cpu=(Goal("seconds", 0.6), Goal("extra", 0.3)),
            is_model=True,
        ),
        Row("input/512", "one training image from its files, 683x512 to 512x512", seconds=_input, devices=("cpu",)),
    ]


def _scaling(quick: bool) -> list[Row]:
    """The points of the plots: the loss and the label map over three axes, mean shift over tokens."""
    K, side = (5, 64) if quick else (150, 512)
    found = []
    for axis, values in {
        "classes": (2, 5) if quick else (5, 19, 60, 150, 500),
        "resolution": (32, 64) if quick else (256, 512, 1024),
        "batch": (1, 2) if quick else (1, 2, 4, 8),
    }.items():
        for value in values:
            sizes: dict[str, int] = {"classes": K, "resolution": side, "batch": 1, axis: value}
            H = sizes["resolution"]
            shape = (sizes["batch"], sizes["classes"], (H // 16, H // 16), (H, H))
            found.append(_loss(f"scaling/{axis}/loss/{value}", *shape, point=(axis, "loss", value)))
            found.append(_label_map(f"scaling/{axis}/label_map/{value}", *shape, point=(axis, "label map", value)))
    for value in (64, 128) if quick else (1024, 4096, 16_384):
        name, point = f"scaling/tokens/mean_shift/{value}", ("tokens", "mean shift", value)
        found += [_shift(name, value, 192, point=point)]
    return found


def _loss(
    name: str,
    batch: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    cpu: tuple[float, float] | None = None,
    cuda: tuple[float, float] | None = None,
    point: tuple[str, str, float] | None = None,
) -> Row:
    return Row(
        name,
        f"loss, {_sizes(classes, grid, size)}, batch {batch}",
        partial(work.loss, batch=batch, classes=classes, grid=grid, size=size),
        cpu=_time_and_memory(cpu),
        cuda=_time_and_memory(cuda),
        needs=lambda setup: MATRICES * batch * classes * size[0] * size[1] * setup.type.itemsize,
        point=point,
    )


def _label_map(
    name: str,
    batch: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    cpu: tuple[float, float] | None = None,
    point: tuple[str, str, float] | None = None,
) -> Row:
    return Row(
        name,
        f"label map, {_sizes(classes, grid, size)}" + (f", batch {batch}" if batch > 1 else ""),
        partial(work.label_map, batch=batch, classes=classes, grid=grid, size=size),
        cpu=_time_and_memory(cpu),
        needs=lambda setup: 2 * batch * classes * size[0] * size[1] * setup.type.itemsize,
        point=point,
    )


def _shift(
    name: str,
    tokens: int,
    channels: int,
    cpu: tuple[float, float] | None = None,
    point: tuple[str, str, float] | None = None,
) -> Row:
    return Row(
        name,
        f"mean shift, {tokens:,} tokens, {channels} wide",
        partial(work.shift, batch=1, tokens=tokens, channels=channels),
        cpu=_time_and_memory(cpu),
        needs=lambda setup: MATRICES * tokens**2 * setup.type.itemsize,
        point=point,
    )


def _time_and_memory(limits: tuple[float, float] | None) -> tuple[Goal, ...]:
    return () if limits is None else (Goal("seconds", limits[0]), Goal("extra", limits[1]))


def _sizes(classes: int, grid: tuple[int, int], size: tuple[int, int]) -> str:
    return f"{classes} classes, {grid[0]}x{grid[1]} to {size[0]}x{size[1]}"


def _input(setup: Setup, turns: int) -> dict[str, list[float]]:
    """Processor seconds per image: the published pipeline, ours, ours without the device's part, decoding alone."""
    import input as loading  # here, so that the processes that measure memory do without OpenCV

    config = loading.Config(num_images=8 if setup.quick else 32, turns=turns)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = loading.make_files(Path(folder), config.num_images)
        dataset = FolderDataset(images, labels, 254, reduce_zero_label=True)  # every value allowed, as in ADE20K
        seconds = loading.measure(config, dataset, decodes=True)
    sides = ("plain", "hand-over", "ours", "decoding")
    return {
        side: [turn / config.num_images for turn in turns] for side, turns in zip(sides, seconds.values(), strict=True)
    }


def _largest_batch(setup: Setup, side: str, *, name: str) -> tuple[int, str]:
    """The largest batch whose training step runs on a GPU, or on the part of it that `gpu_memory` allows."""
    reasons = [""]

    if setup.gpu_memory is not None:
        total = torch.cuda.get_device_properties(setup.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, setup.gpu_memory * 1e9 / total))

    def fits(batch: int) -> bool:
        made: Any = None
        try:
            made = work.step(setup, name, batch)
            made.call(side)
            made.call(side)  # with the optimizer's state
            torch.cuda.synchronize()
        except RuntimeError as error:  # also where a tensor has more elements than a kernel can count
            reasons.append(f"at {batch}, {str(error).splitlines()[0]}")
            return False
        finally:
            del made
            torch.cuda.empty_cache()
        return True

    return largest_that_fits(fits), reasons[-1]
