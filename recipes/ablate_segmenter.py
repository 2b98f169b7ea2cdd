"""Segmenter's ablations in one command: the paper's Tables 2 to 5, its numbers beside ours.

    accelerate launch recipes/ablate_segmenter.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/ablate_segmenter.py --tables 4 --backbone vit_base_patch16_384.augreg_in21k_ft_in1k
    accelerate launch recipes/ablate_segmenter.py --demo

Tables are those of https://arxiv.org/abs/2105.05633: `2` dropout x stochastic depth, `3` size of backbone and patch,
`4` linear and mask decoder by the size of objects, `5` number of training images (at the same number of iterations).

Every training is made once, however many rows need it, on the same samples in the same order for one seed. What is
finished is kept in `--output`: a sweep that was killed, or that is asked for more, goes on from there. Side by side on
several GPUs: `CUDA_VISIBLE_DEVICES=2 python recipes/ablate_segmenter.py --shard 2/4 ...` for each of 0/4 to 3/4.

The defaults of a training are recipes/segmenter_ade20k.py's with the linear decoder on Seg-S/16's backbone. Dropout is
where the published code has it: on the tokens with their positions, the attention weights, and behind each projection.
The paper's numbers are its repository's README's, and one that is known to us otherwise (Seg-Ti/16, 39.03); a dash is a
number that we could not look up.

Hours: one training of the defaults is 160k iterations of 8 images, not yet measured; `--iterations` makes it shorter.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from segheads import SegmentationModel, create_model
from segheads.ablation import COLUMNS, MEAN_IOU, Column, GridConfig, Row, Table, axis, run_grid
from segheads.cli.run import run
from segheads.inference import InferenceProtocol
from segheads.ranges import Range
from segheads.training import DEMO_RUN, LoopConfig, ModelConfig, OptimizationConfig, changed


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """Segmenter's configuration; every other number is TrainingConfig's."""

    output: Path = Path("runs/ablate_segmenter")
    """Folder of the trainings, one in a folder of its own, and of the tables."""

    # The axes
    tables: tuple[str, ...] = axis(("2", "3", "4", "5"))
    """Which tables to make."""
    drop_rates: Annotated[tuple[float, ...], Range(0, 1, below=True)] = axis((0.0, 0.1))
    """Dropout in the backbone, of table 2."""
    drop_path_rates: Annotated[tuple[float, ...], Range(0, 1, below=True)] = axis((0.0, 0.1, 0.2))
    """Stochastic depth, of table 2."""
    backbones: tuple[str, ...] = axis(
        (
            "vit_tiny_patch16_384.augreg_in21k_ft_in1k",
            "vit_small_patch32_384.augreg_in21k_ft_in1k",
            "vit_small_patch16_384.augreg_in21k_ft_in1k",
            "vit_base_patch32_384.augreg_in21k_ft_in1k",
            "vit_base_patch16_384.augreg_in21k_ft_in1k",
            "vit_base_patch8_224.augreg_in21k_ft_in1k",
            "vit_large_patch16_384.augreg_in21k_ft_in1k",
        )
    )
    """Of table 3: architectures, or an architecture with patches of another size as NAME/SIZE."""
    decoders: tuple[str, ...] = axis(("linear", "mask_transformer"))
    """Heads of table 4."""
    training_set_sizes: Annotated[tuple[int, ...], Range(1)] = axis((4000, 8000, 12000, 16000, 20000))
    """Numbers of training images, of table 5; the smaller sets are parts of the larger."""

    model: ModelConfig = ModelConfig(
        backbone="vit_small_patch16_384.augreg_in21k_ft_in1k",  # of tables 2, 4 and 5
        head="linear",  # of tables 2, 3 and 5
        drop_path_rate=0.1,
        loss_reduction="valid",
    )
    """Backbone of tables 2, 4 and 5, head of 2, 3 and 5, and loss."""
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="sgd", learning_rate=1e-3, min_learning_rate=1e-5, power=0.9, weight_decay=0.0
    )
    """Optimizer and learning rate."""
    loop: LoopConfig = LoopConfig(batch_size=8, evaluate_every=0)
    """Length, evaluations, checkpoints, log."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512), window=512, stride=512)
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""


DEMO = changed(
    Config(),
    output=Path("runs/demo_ablate_segmenter"),
    backbone="vit_tiny_patch16_224",
    patch_size=8,
    depth=2,
    backbones=("vit_tiny_patch16_224/16", "vit_tiny_patch16_224/8"),
    drop_path_rates=(0.0, 0.1),
    training_set_sizes=(20, 200, 2000),
    **{**DEMO_RUN, "iterations": 100, "tracker": "none"},
)

# mIoU on ADE20K at one scale, by the start of timm's name and the decoder
PAPER = {
    ("vit_tiny_patch16", "linear"): 39.03,
    ("vit_base_patch8", "linear"): 49.5,
    ("vit_tiny_patch16", "mask_transformer"): 38.1,
    ("vit_small_patch16", "mask_transformer"): 45.3,
    ("vit_base_patch16", "mask_transformer"): 48.5,
}
BY_SIZE = tuple(Column(f"mIoU_{size}", size, 2) for size in ("small", "medium", "large"))


def paper(config: Config, backbone: str, head: str) -> dict[str, float]:
    """What is known of a model, where it is the paper's."""
    start = "_".join(backbone.split(".")[0].split("_")[:3])
    known = PAPER.get((start, head))
    return (
        {}
        if known is None or config.model.patch_size is not None or config.model.depth is not None
        else {"mIoU": known}
    )


def tables(config: Config) -> dict[str, Table]:
    """The rows of every table."""
    seeds = config.seeds
    note = f"Paper: ADE20K, 160,000 iterations of 8 images. Ours: {config.summary()}."
    own = paper(config, config.model.backbone, config.model.head)
    return {
        "2": Table(
            "Segmenter, Table 2: dropout and stochastic depth",
            [
                Row(
                    f"dropout {rate:g}, stochastic depth {path:g}",
                    {"drop_path_rate": path, **({"model_kwargs": dropout(rate)} if rate else {})},
                    paper=own if (rate, path) == (0.0, 0.1) else {},
                    axes={"dropout": rate, "stochastic depth": path},
                    seeds=seeds,
                )
                for rate, path in product(config.drop_rates, config.drop_path_rates)
            ],
            x="stochastic depth",
            note=note,
        ),
        "3": Table("Segmenter, Table 3: size of backbone and patch", backbone_rows(config), note=note),
        "4": Table(
            "Segmenter, Table 4: decoder by size of objects",
            [
                Row(
                    decoder,
                    {"head": decoder},
                    evaluation={"metrics": ("iou", "object_sizes")},
                    paper=paper(config, config.model.backbone, decoder),
                    seeds=seeds,
                )
                for decoder in config.decoders
            ],
            columns=(MEAN_IOU, *BY_SIZE, *COLUMNS[1:]),
            drawn=("mIoU", *(column.key for column in BY_SIZE)),
            note=f"{note} Small is below 32² pixels, large above 96².",
        ),
        "5": Table(
            "Segmenter, Table 5: number of training images",
            [
                Row(f"{size:,}", {"train_images": size}, axes={"training images": size}, seeds=seeds)
                for size in config.training_set_sizes
            ],
            x="training images",
            note=note,
        ),
    }


def backbone_rows(config: Config) -> list[Row]:
    """Backbones, with patches of their own or another size."""
    rows = []
    for backbone in config.backbones:
        name, _, patch = backbone.rpartition("/")
        training: dict[str, Any] = {"backbone": backbone}
        if patch.isdigit() and name:
            training = {"backbone": name, "patch_size": int(patch)}
        known = paper(config, backbone, config.model.head) if "patch_size" not in training else {}
        rows.append(Row(backbone, training, paper=known, seeds=config.seeds))
    return rows


def dropout(rate: float) -> dict[str, Any]:
    """Arguments of `create_model` for dropout everywhere in a ViT."""
    rates = dict.fromkeys(("pos_drop_rate", "attn_drop_rate", "proj_drop_rate"), rate)
    return {"backbone_kwargs": {"model_kwargs": rates}}


def build_model(config: Config, num_classes: int) -> SegmentationModel:
    """The model of one training; the mask transformer's dropout is the published code's."""
    options = config.model_options(num_classes)
    published = {"drop_rate": 0.1, "drop_path_rate": 0.0} if config.model.head == "mask_transformer" else {}
    options["head_kwargs"] = {**published, **options.get("head_kwargs", {})}
    return create_model(config.model.backbone, config.model.head, num_classes, **options)


def main(config: Config) -> None:
    """Make the tables."""
    run_grid(config, tables(config), build_model)


if __name__ == "__main__":
    run(main, Config, demo=DEMO, description=__doc__)
