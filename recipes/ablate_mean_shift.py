"""Mean shift's ablations in one command: the thesis' Tables 1 and 2 beside ours, and a grid of what it left open.

    accelerate launch recipes/ablate_mean_shift.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/ablate_mean_shift.py --tables grid inference --seeds 3 --iterations 40000
    accelerate launch recipes/ablate_mean_shift.py --demo

Tables: `1` is the thesis' L_ms x d_ms; `2` its L'_ms, the layers at inference of a model trained with L_ms, which is
read from the models of table 1 and trains nothing; `grid`, ours, is kernel x L_ms x blurring x d_ms x step;
`inference` is table 2 for all kernels, read from models of the grid; `variants` is L_ms x whatever `--variants` says,
each a JSON object of options of the head. No shift (the linear head) stands in 1, grid and variants.

Every training is made once, however many rows need it, on the same samples in the same order for one seed. What is
finished is kept in `--output`: a sweep that was killed, or that is asked for more, goes on from there. Side by side on
several GPUs: `CUDA_VISIBLE_DEVICES=2 python recipes/ablate_mean_shift.py --shard 2/4 ...` for each of 0/4 to 3/4.

The defaults of a training are recipes/meanshifter_ade20k.py's: the author's configuration at Segmenter's batch size.
The thesis' runs had one image on one GPU: `--batch-size 1`. Its numbers are those that are known to us (31.05, 19.37
and 4.07 at d_ms 192; 31.44 for its own Segmenter); a dash is a number that we could not look up, or that it lacks.

Hours: one training of the defaults is 160k iterations of 8 images, not yet measured; `--iterations` makes it shorter.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro

from segheads.ablation import GridConfig, Row, Table, axis, run_grid
from segheads.cli.run import run
from segheads.errors import OptionError
from segheads.inference import InferenceProtocol
from segheads.ranges import Range
from segheads.training import DEMO_RUN, LoopConfig, ModelConfig, OptimizationConfig, changed


@dataclass(frozen=True, kw_only=True)
class Model(ModelConfig):
    """The backbone and the loss; rows say the head."""

    head: tyro.conf.Suppress[str] = "linear"


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """The author's configuration; every other number is TrainingConfig's."""

    output: Path = Path("runs/ablate_mean_shift")
    """Folder of the trainings, one in a folder of its own, and of the tables."""

    # The axes
    tables: tuple[str, ...] = axis(("1", "2"))
    """Which tables to make, of 1, 2, grid, inference and variants."""
    shift_layers: Annotated[tuple[int, ...], Range(1)] = axis((1, 2, 3, 4))
    """L_ms in training; 0, no shift, has a row of its own."""
    read_layers: Annotated[tuple[int, ...], Range(0)] = axis((0, 1, 2, 3, 4))
    """L'_ms at inference."""
    thesis_channels: Annotated[tuple[int, ...], Range(1)] = axis((96, 192, 384))
    """d_ms of table 1; table 2 reads from the first that is 192, or from the first."""
    shift_channels: Annotated[tuple[int, ...], Range(1)] = axis((192,))
    """d_ms of grid, inference (its first) and variants (its first)."""
    kernels: tuple[str, ...] = axis(("dot", "gaussian", "cosine"))
    """Kernels of grid and inference."""
    blurring: tuple[bool, ...] = axis((True, False))
    """Of the grid: shift the tokens themselves, or against the original ones."""
    steps: Annotated[tuple[float, ...], Range(0, above=True)] = axis((1.0,))
    """Of the grid: how far a shift goes."""
    variants: tuple[str, ...] = axis(
        ('{"kernel": "dot"}', '{"kernel": "cosine", "blurring": false, "learn_step": true}')
    )
    """Options of the mean_shift head, each a JSON object."""

    decoder: str = "linear"
    """The head after the shift."""

    model: Model = Model(
        backbone="vit_tiny_patch16_384.augreg_in21k_ft_in1k",  # Segmenter's Ti/16: ImageNet-21k, then 1k at 384
        drop_path_rate=0.1,
        loss_reduction="all",  # as the author's code
    )
    """Backbone and loss."""
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="momentum",  # the author's SGD; Segmenter's is sgd, with Nesterov
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        power=0.9,
        weight_decay=0.0,
    )
    """Optimizer and learning rate."""
    loop: LoopConfig = LoopConfig(batch_size=8, evaluate_every=0)
    """Length, evaluations, checkpoints, log."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512), window=512, stride=480)
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""


DEMO = changed(
    Config(),
    output=Path("runs/demo_ablate_mean_shift"),
    backbone="vit_tiny_patch16_224",
    patch_size=8,
    depth=2,
    shift_layers=(1, 3),
    thesis_channels=(192,),
    variants=('{"kernel": "dot"}', '{"kernel": "cosine"}'),
    **{**DEMO_RUN, "iterations": 100, "tracker": "none"},
)

# mIoU on ADE20K, at d_ms 192, with one image in a batch
THESIS = {1: 31.05, 2: 19.37, 3: 4.07}
THESIS_CHANNELS = 192
THESIS_SEGMENTER = 31.44


def shifted(config: Config, num_layers: int, **options: Any) -> dict[str, Any]:
    """What a training with mean shift changes."""
    head = {"num_layers": num_layers, **options}
    if config.decoder != "linear":
        head["decoder"] = config.decoder
    return {"head": "mean_shift", "model_kwargs": {"head_kwargs": head}}


def no_shift(config: Config, **paper: float) -> Row:
    """The row that all others are to be compared with."""
    return Row(f"no shift ({config.decoder})", {"head": config.decoder}, paper=paper, seeds=config.seeds)


def tables(config: Config) -> dict[str, Table]:
    """The rows of every table."""
    layers = [n for n in config.shift_layers if n > 0]
    note = f"Paper: ADE20K, ViT-Ti/16, 160,000 iterations of 1 image. Ours: {config.summary()}."
    return {
        "1": Table(
            "Thesis, Table 1: layers L_ms and width d_ms",
            [no_shift(config, mIoU=THESIS_SEGMENTER), *thesis_rows(config, layers)],
            x="L_ms",
            note=note,
        ),
        "2": Table(
            "Thesis, Table 2: layers L'_ms at inference", inference_rows(config, ["dot"], layers), x="L'_ms", note=note
        ),
        "grid": Table(
            "Kernels",
            [no_shift(config), *grid_rows(config, layers)],
            x="L_ms",
            panel="d_ms",
            note=config.summary(),
            from_paper=False,
        ),
        "inference": Table(
            "Layers L'_ms at inference",
            inference_rows(config, config.kernels, layers),
            x="L'_ms",
            panel="kernel",
            note=note,
        ),
        "variants": Table(
            "Variants",
            [no_shift(config), *variant_rows(config, layers)],
            x="L_ms",
            note=config.summary(),
            from_paper=False,
        ),
    }


def thesis_rows(config: Config, layers: list[int]) -> list[Row]:
    """L_ms x d_ms with the thesis' kernel."""
    return [
        Row(
            f"L_ms {n}, d_ms {channels}",
            shifted(config, n, shift_channels=channels),
            paper={"mIoU": THESIS[n]} if channels == THESIS_CHANNELS and n in THESIS else {},
            axes={"L_ms": n, "d_ms": channels},
            seeds=config.seeds,
        )
        for channels, n in product(config.thesis_channels, layers)
    ]


def inference_rows(config: Config, kernels: Any, layers: list[int]) -> list[Row]:
    """L'_ms at inference from models of L_ms layers; the thesis' own where both are equal and the kernel is its."""
    thesis = THESIS_CHANNELS if THESIS_CHANNELS in config.thesis_channels else config.thesis_channels[0]
    rows = []
    for kernel, trained, read in product(kernels, layers, config.read_layers):
        channels = thesis if kernel == "dot" else config.shift_channels[0]
        known = kernel == "dot" and trained == read and trained in THESIS and channels == THESIS_CHANNELS
        row = Row(
            f"{kernel}, L_ms {trained}, read with {read}",
            shifted(config, trained, shift_channels=channels, **kernel_option(kernel)),
            settings={} if trained == read else {"num_layers": read},
            paper={"mIoU": THESIS[trained]} if known else {},
            axes={"L'_ms": read, "L_ms": trained, "kernel": kernel},
            seeds=config.seeds,
        )
        rows.append(row)
    return rows


def grid_rows(config: Config, layers: list[int]) -> list[Row]:
    """Kernel x blurring x step x L_ms x d_ms; with one layer nothing can blur, so that both rows read one training."""
    return [
        Row(
            f"{kernel}, {'blurring' if blurs else 'not blurring'}, step {step:g}, d_ms {channels}, L_ms {n}",
            shifted(
                config,
                n,
                shift_channels=channels,
                **kernel_option(kernel),
                **({} if blurs or n == 1 else {"blurring": False}),
                **({} if step == 1 else {"step": step}),
            ),
            axes={"kernel": kernel, "blurring": blurs, "step": step, "d_ms": channels, "L_ms": n},
            seeds=config.seeds,
        )
        for channels, kernel, blurs, step, n in product(
            config.shift_channels, config.kernels, config.blurring, config.steps, layers
        )
    ]


def variant_rows(config: Config, layers: list[int]) -> list[Row]:
    """L_ms x options of the head."""
    rows = []
    for variant, n in product(config.variants, layers):
        try:
            options = json.loads(variant)
        except json.JSONDecodeError as error:
            raise OptionError(f"variants must be JSON objects; got {variant!r} ({error})") from error
        if not isinstance(options, dict):
            raise OptionError(f"variants must be JSON objects; got {variant!r}")
        name = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
        if options.get("kernel") == "dot":
            del options["kernel"]
        training = shifted(config, n, **{"shift_channels": config.shift_channels[0], **options})
        rows.append(Row(f"{name}, L_ms {n}", training, axes={"variant": name, "L_ms": n}, seeds=config.seeds))
    return rows


def kernel_option(kernel: str) -> dict[str, str]:
    """Nothing for the head's default, so that its trainings serve every table."""
    return {} if kernel == "dot" else {"kernel": kernel}


def main(config: Config) -> None:
    """Make the tables."""
    run_grid(config, tables(config))


if __name__ == "__main__":
    run(main, Config, demo=DEMO, description=__doc__)
