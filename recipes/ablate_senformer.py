"""The SenFormer paper's ablations in one command: the paper's rows beside ours, with parameters and multiply-adds.

    accelerate launch recipes/ablate_senformer.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/ablate_senformer.py --tables 1 10 --iterations 40000
    accelerate launch recipes/ablate_senformer.py --tables heads --dataset camvid --data-root data/camvid
    accelerate launch recipes/ablate_senformer.py --demo

Tables are those of https://arxiv.org/abs/2111.13280: 1 learners alone and together, 2 sharing of weights, 3 number of
blocks, 4 self-ensemble against feature fusion, 10 merging, 11 variance of the ensemble and of its learners, 12 learners
per level, 13 pyramid and place of the norms; and `heads`, which is ours: what people use today beside what is here.

Every training is made once, however many rows need it, from the same seed, on the same samples in the same order. Rows
that differ only in who votes and how are read from one trained model. What is finished is kept in `--output`: a run
that was interrupted, or that is asked for more tables, goes on from there.

Hours: one training of the defaults (ResNet-50, 160k iterations of 16 images) each, not yet measured; `--iterations` and
`--batch-size` make them shorter.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from accelerate import Accelerator

from segheads import SegmentationModel, create_model
from segheads.functional.upsample import Reduction
from segheads.training import (
    DEMO_RUN,
    MAY_DIFFER,
    EvaluationSamples,
    RunFolder,
    TrainingConfig,
    count_multiply_adds,
    count_parameters,
    evaluate,
    load_data,
    run_training,
    scores,
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """SenFormer's protocol with a ResNet; every other number is TrainingConfig's."""

    tables: tuple[str, ...] = ("1", "2", "3", "4", "10", "11", "12", "13")
    """Which tables to make."""
    output: Path = Path("runs/ablate_senformer")
    """Folder of the runs, one in a folder of its own, and of the tables."""
    resume: bool = True
    """Go on with what `output` holds."""

    # The model
    backbone: str = "resnet50.tv_in1k"
    head: str = "senformer"
    """Not used: the tables say which."""
    width: int = 512
    """Channels (d) of the pyramids and of what stands on them."""
    auxiliary_weight: float = 0.4
    """Weight in training of an FCN head on the backbone's third stage; 0 builds none."""
    seeds: int = 3
    """Trainings of the ensemble for its variance (table 11)."""
    backbone_lr_scale: float = 0.1
    """The backbone's rate over that of the rest; 1 where it starts from random weights."""
    drop_path_rate: float = 0.0
    loss_reduction: Reduction = "valid"

    # The optimisation
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.0
    power: float = 1.0
    warmup_iterations: int = 1500
    weight_decay: float = 1e-4
    max_grad_norm: float | None = 3.0

    # The evaluation
    window: int | None = None
    stride: int | None = None
    evaluate_every: int = 0


DEMO = Config(
    output=Path("runs/demo_ablation"),
    tables=("1", "10"),
    backbone="test_resnet",
    backbone_lr_scale=1.0,
    width=32,
    **{**DEMO_RUN, "iterations": 60, "tracker": "none"},
)


# The paper's numbers as far as they are public outside the paper (its repository's README) or known to us: mIoU on
# ADE20K with ResNet-50 and one scale, parameters, FLOPs. A dash is no measurement: the paper has it, we could not look
# it up.
SENFORMER = "44.38; 55M; 179G"


@dataclass(frozen=True)
class Training:
    """One trained model."""

    head: str = "senformer"
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    pyramid: str | None = "auto"
    seed: int = 0

    def folder(self) -> str:
        """A name that tells the models of one ablation apart."""
        options = "_".join(f"{key}-{value}" for key, value in _flat(self.head_kwargs))
        parts = [self.head.replace(":", "-"), options, "" if self.pyramid == "auto" else str(self.pyramid)]
        return "__".join([part for part in parts if part] + ([f"seed-{self.seed}"] if self.seed else []))


@dataclass(frozen=True)
class Row:
    """One line of a table: a trained model, changed by `settings`, and what the paper has for it."""

    name: str
    training: Training
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str = "–"


@dataclass(frozen=True)
class Table:
    """One table."""

    title: str
    rows: list[Row]


def senformer(seed: int = 0, pyramid: str | None = "auto", **head_kwargs: Any) -> Training:
    """The ensemble, with options of `SenFormerHead`."""
    return Training("senformer", head_kwargs, pyramid, seed)


def blocks(**learner_kwargs: Any) -> dict[str, Any]:
    """Options of the class-attention learners."""
    return {"learner_kwargs": learner_kwargs}


def tables(config: Config) -> dict[str, Table]:
    """The rows of every table."""
    level_names = ["P2", "P3", "P4", "P5"]
    subsets = [[0], [1], [2], [3], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    apart = blocks(shared_block=False)
    ensembles = [senformer(seed=seed) for seed in range(config.seeds)]
    return {
        "heads": Table(
            "Heads, the same budget for all",
            [
                Row("linear, on FPN", Training("linear")),
                Row("mask transformer, on FPN", Training("mask_transformer")),
                Row("mean shift, on FPN", Training("mean_shift")),
                Row("SenFormer", senformer()),
                Row("SenFormer, mean shift inside", senformer(mean_shift_layers=1)),
                Row("feature fusion", Training("feature_fusion")),
                Row("UPerNet", Training("uper")),
                Row("smp:unet", Training("smp:unet")),
                Row("SenUPer", Training("sen_uper")),
            ],
        ),
        "1": Table(
            "Table 1: learners alone and together",
            [Row(" + ".join(level_names[i] for i in levels), senformer(), {"levels": levels}) for levels in subsets],
        ),
        "2": Table(
            "Table 2: sharing of weights",
            [
                Row("repeated block", senformer(), paper=SENFORMER),
                Row("separate blocks", senformer(**apart), paper="44.6; 144M; 179G"),
                Row("repeated block, learners share it", senformer(share="decoder")),
                Row("repeated block, learners share class embeddings", senformer(share="class_embeddings")),
            ],
        ),
        "3": Table(
            "Table 3: number of blocks",
            [Row(f"{n}", senformer(**({} if n == 6 else blocks(num_layers=n)))) for n in (1, 2, 4, 6, 8)],
        ),
        "4": Table(
            "Table 4: self-ensemble against feature fusion",
            [
                Row("UPerNet, fused", Training("uper"), paper="67M; 238G"),
                Row("SenUPer, self-ensemble", Training("sen_uper")),
                Row("class attention, fused", Training("feature_fusion")),
                Row("SenFormer, self-ensemble", senformer(), paper=SENFORMER),
            ],
        ),
        "10": Table(
            "Table 10: merging",
            [
                Row("average", senformer()),
                Row("product", senformer(), {"merge": "product"}),
                Row("majority vote", senformer(), {"merge": "majority_vote"}),
                Row("hierarchical attention", senformer(merge="hierarchical_attention")),
                Row("explicit attention", senformer(merge="explicit_attention")),
            ],
        ),
        "11": Table(
            "Table 11: variance of the ensemble and of its learners",
            [Row(f"ensemble, seed {t.seed}", t) for t in ensembles]
            + [
                Row(f"{level_names[level]}, seed {t.seed}", t, {"levels": [level]})
                for level in range(4)
                for t in ensembles
            ],
        ),
        "12": Table(
            "Table 12: learners per level",
            [Row("1", senformer()), *(Row(f"{n}", senformer(learners_per_level=n)) for n in (2, 3))],
        ),
        "13": Table(
            "Table 13: pyramid, and place of the norms",
            [
                Row("FPNT, pre-norm", senformer()),
                Row("FPN, pre-norm", senformer(pyramid="fpn")),
                Row("FPNT, post-norm", senformer(**blocks(pre_norm=False))),
            ],
        ),
    }


def main(config: Config) -> None:
    """Make the tables, one after the other."""
    chosen = tables(config)
    if unknown := [name for name in config.tables if name not in chosen]:
        raise SystemExit(f"error: --tables {' '.join(unknown)} must be some of {' '.join(chosen)}")
    for name in config.tables:
        table = chosen[name]
        measured = [measure(config, row) for row in table.rows]
        if Accelerator().is_main_process:
            text = markdown(table, measured)
            if name == "11":
                text += "\n" + deviations(table, measured)
            (config.output / f"table_{name}.md").write_text(text + "\n")
            print(text)


def measure(config: Config, row: Row) -> dict[str, float]:
    """aAcc, mAcc and mIoU in percent of one row, trained if it has not been, with its costs."""
    own = own_config(config, row.training)
    folder = own.output
    try:
        RunFolder(folder, own.as_json(), resume=True, may_differ=MAY_DIFFER)
    except ValueError as error:  # what lies there is of another budget
        raise SystemExit(f"error: {error}; give another --output") from error
    measured = folder / "measured.json"
    known: dict[str, dict[str, float]] = json.loads(measured.read_text()) if measured.is_file() else {}
    key = json.dumps(row.settings)
    if key in known:
        return known[key]
    if not (folder / "results.json").is_file():
        train(config, row.training)
    model = SegmentationModel.from_pretrained(folder / "model")
    for name, value in row.settings.items():
        setattr(model.head, name, value)
    size = (config.crop_size, config.crop_size)
    costs = {
        "parameters": count_parameters(model) / 1e6,
        "multiply_adds": count_multiply_adds(model, size) / 1e9,
    }
    if row.settings:
        values = evaluate_again(config, model)
    else:
        results = json.loads((folder / "results.json").read_text())
        values = {name: results[name] for name in ("aAcc", "mAcc", "mIoU")}
    known[key] = {**{name: 100 * value for name, value in values.items()}, **costs}
    if Accelerator().is_main_process:
        measured.write_text(json.dumps(known, indent=2) + "\n")
    Accelerator().wait_for_everyone()
    return known[key]


def own_config(config: Config, training: Training) -> Config:
    """The configuration of one training: nothing in it depends on which tables were asked for."""
    folder, seed = config.output / training.folder(), config.seed + training.seed
    return dataclasses.replace(config, output=folder, head=training.head, seed=seed, tables=(), seeds=1)


def train(config: Config, training: Training) -> None:
    """Train one model in its own folder."""
    build = partial(build_model, training)
    run_training(own_config(config, training), build, backbone_lr_scale=config.backbone_lr_scale)


def build_model(training: Training, config: Config, num_classes: int) -> SegmentationModel:
    """The model of one training: `width` goes to the pyramid, or to the head that has its own."""
    own_width = training.head in ("uper", "sen_uper")
    has_pyramid = not own_width and not training.head.startswith("smp:")
    return create_model(
        config.backbone,
        training.head,
        num_classes,
        pyramid=training.pyramid,
        pyramid_kwargs={"out_channels": config.width} if has_pyramid else {},
        head_kwargs={**training.head_kwargs, **({"channels": config.width} if own_width else {})},
        auxiliary_weight=config.auxiliary_weight,
        auxiliary_kwargs={"channels": config.width},
        **config.model_options(),
    )


def evaluate_again(config: Config, model: SegmentationModel) -> dict[str, float]:
    """Scores, as fractions, of a trained model that was changed."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    _, validation_set = load_data(accelerator, config)
    samples = EvaluationSamples(validation_set, model.data_config["mean"], model.data_config["std"], config.scale)
    model = model.to(accelerator.device)
    results = evaluate(accelerator, model, samples, window=config.window, stride=config.stride, workers=config.workers)
    return scores(results)


def markdown(table: Table, measured: list[dict[str, float]]) -> str:
    """The table, the paper's numbers beside ours."""
    lines = [
        f"{table.title}",
        "",
        "| | paper | aAcc | mAcc | mIoU | parameters, M | multiply-adds, G |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row, m in zip(table.rows, measured, strict=True):
        numbers = f"{m['aAcc']:.1f} | {m['mAcc']:.1f} | {m['mIoU']:.1f} | {m['parameters']:.1f} | "
        lines.append(f"| {row.name} | {row.paper} | {numbers}{m['multiply_adds']:.1f} |")
    return "\n".join(lines)


def deviations(table: Table, measured: list[dict[str, float]]) -> str:
    """Mean and standard deviation over seeds of the ensemble and of each learner (rows of one name)."""
    groups: dict[str, list[float]] = {}
    for row, m in zip(table.rows, measured, strict=True):
        groups.setdefault(row.name.split(",")[0], []).append(m["mIoU"])
    lines = ["", "| | mIoU, mean | standard deviation over seeds |", "|---|--:|--:|"]
    for name, values in groups.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {spread} |")
    return "\n".join(lines)


def _flat(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, str(value)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEMO if "--demo" in sys.argv else Config(), description=__doc__))
