"""Train many heads at once on one frozen backbone: the table of N heads for about the time of one.

    accelerate launch recipes/probe_heads.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/probe_heads.py --heads linear "senformer @ simple(out_channels=128)"
    accelerate launch recipes/probe_heads.py --heads all --dataset camvid --data-root data/camvid
    accelerate launch recipes/probe_heads.py --distinct-batches 200 --cache features --cache-gb 50
    accelerate launch recipes/probe_heads.py --demo

The backbone runs once for each batch, in evaluation mode and without gradients, and every head at every learning rate
learns from its maps; on one CPU process each ends up with the same bits as in a run of its own. With `--cache` the
backbone runs once for each different batch, in this run and in all later ones.

`--output` ends up with heads.md, heads.csv and heads.json (mIoU, aAcc, mAcc, parameters; the best rate of each head is
marked), curves.png, and every head: `models/HEAD` for `SegmentationModel.from_pretrained`, at its best rate, and
`heads/HEAD_at_RATE` for `segheads.training.join_head`.

Hours and scores on ADE20K: not yet measured.
"""

import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from segheads import SegmentationModel, create_model, list_heads
from segheads.data import PhotometricNormalize, RandomScaleCrop, SegmentationDataset, TrainingSamples, collate_samples
from segheads.data.samples import EvaluationSamples
from segheads.evaluation import scores
from segheads.functional.upsample import Reduction
from segheads.inference.protocol import InferenceProtocol
from segheads.plan import HeadChoice, parse_head
from segheads.probing import (
    CachedSamples,
    FeatureCache,
    Probe,
    RoundSampler,
    SharedBackbone,
    as_it_is,
    build_probes,
    evaluate_probes,
    feature_batches,
    fingerprint_data,
    fingerprint_module,
    join_head,
    probe_markdown,
    probe_rows,
    save_probes,
    train_probes,
    write_probe_report,
)
from segheads.training import (
    DEMO_RUN,
    MAY_DIFFER,
    RunFolder,
    TrainingConfig,
    create_optimizer,
    load_data,
    poly_learning_rate,
)
from segheads.training.run import begin_run, errors_in_a_line


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """AdamW on frozen features; what `TrainingConfig` says of the backbone's training does not apply."""

    heads: tuple[str, ...] = ("linear", "fcn", "mean_shift", "class_attention", "mask_transformer")
    """Each NAME, NAME(option=value, ...), or either with @ PYRAMID(option=value, ...); or all, that fit."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The rates that every head learns with."""
    distinct_batches: int | None = None
    """Go round in so many batches of crops, in another order each time; None crops anew in every epoch."""
    cache: Path | None = None
    """Keep the backbone's maps in this folder, for this run and later ones."""
    cache_gb: float = 20.0
    """How large that folder may grow, in units of 1e9 bytes."""
    output: Path = Path("runs/probe_heads")

    # The model
    backbone: str = "vit_small_patch16_224"
    head: str = "all"
    """Not used: `heads` says which."""
    drop_path_rate: float = 0.0
    """Without effect: the backbone is frozen in evaluation mode."""
    loss_reduction: Reduction = "valid"

    # The optimisation
    iterations: int = 20_000
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float = 0.0
    """Not used: `learning_rates` says which."""
    min_learning_rate: float = 0.0
    power: float = 0.9
    warmup_iterations: int = 500
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0

    # The evaluation
    window: int | None = 512
    stride: int | None = 512
    evaluate_every: int = 0


DEMO = Config(
    output=Path("runs/demo_probe"),
    heads=tuple(f"{head} @ fpn(out_channels=32)" for head in ("linear", "mean_shift", "mask_transformer", "senformer")),
    backbone="test_convnext",
    learning_rates=(1e-3, 3e-3),
    **{**DEMO_RUN, "iterations": 80, "batch_size": 8, "warmup_iterations": 10, "tracker": "none"},
)


def main(config: Config) -> list[dict[str, Any]]:
    """Train all heads, evaluate them, write the table; returns its rows, in every process."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    run = open_run(accelerator, config)
    training_set, validation_set = load_data(accelerator, config)
    with errors_in_a_line():
        sampler(config, training_set, 0)  # refuses what is out of range
        create = partial(create_head, config, training_set.num_classes)
        shared, probes = build_probes(
            create,
            chosen_heads(config),
            config.learning_rates,
            seed=config.seed,
            channels_last=config.channels_last,
            leave_out=partial(leave_out, accelerator, config),
        )
        for probe in probes:
            prepare_probe(accelerator, config, probe)
    shared.to(accelerator.device)
    mean, std = (shared.backbone.data_config[key] for key in ("mean", "std"))
    samples = TrainingSamples(training_set, RandomScaleCrop(config.crop_size, scale=config.scale), seed=config.seed)
    cache = None
    if config.cache is not None:
        with errors_in_a_line():
            cache = open_cache(accelerator, config, shared, samples)
    start = begin_run(accelerator, config, run)
    loader = accelerator.prepare(training_loader(config, samples, cache, start))
    if start:
        run.load(accelerator, start)
    accelerator.print(
        f"{len(probes)} heads on {config.backbone}, which is frozen: "
        f"{len(training_set)} training and {len(validation_set)} validation images of {training_set.num_classes} "
        f"classes; {accelerator.num_processes} process(es) on {accelerator.device.type}"
    )

    evaluate = partial(
        evaluate_probes,
        accelerator,
        shared,
        probes,
        EvaluationSamples(validation_set, mean, std, config.scale),
        InferenceProtocol(window=config.window, stride=config.stride),
        workers=config.workers,
    )
    train_probes(
        accelerator,
        shared,
        probes,
        feature_batches(
            accelerator,
            loader,
            PhotometricNormalize(mean, std).to(accelerator.device),
            shared,
            cache=cache,
            channels_last=shared.channels_last,
        ),
        run,
        schedule=partial(scheduled, config),
        seed=config.seed,
        start=start,
        iterations=config.iterations,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation,
        max_grad_norm=config.max_grad_norm,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        evaluate_every=config.evaluate_every,
        evaluate=lambda: [scores(results) for results in evaluate(limit=config.evaluate_images)],
    )

    rows = probe_rows(probes, [scores(results) for results in evaluate()])
    if accelerator.is_main_process:
        title = f"Heads on a frozen {config.backbone}, {config.dataset}, {config.iterations} iterations"
        save(config, shared, probes, rows)
        write_probe_report(run.path, rows, run.records(), title)
        print(probe_markdown(rows, title))
        print(f"tables, curves and models are in {run.path}")
    accelerator.wait_for_everyone()  # a process that leaves early can hang the others as they shut down
    accelerator.end_training()
    return rows


def open_run(accelerator: Accelerator, config: Config) -> RunFolder:
    """The run's folder, checked but not yet written to, and what heads on frozen features have no use for."""
    parts = config.gradient_accumulation * accelerator.num_processes
    if config.batch_size < 1 or config.batch_size % parts:
        raise SystemExit(
            f"error: --batch-size {config.batch_size} is over all {accelerator.num_processes} processes and "
            f"{config.gradient_accumulation} accumulated batches, and must be a multiple of {parts}"
        )
    if config.mixed_precision == "fp16":
        raise SystemExit(
            "error: --mixed-precision fp16 scales the loss by one factor, which one head's overflow would change for "
            "all; use bf16 or no"
        )
    for option in ("compile", "calibration"):
        if getattr(config, option):
            raise SystemExit(f"error: --{option} is for one model; train the head that you choose with its own recipe")
    values, keep = config.as_json(), config.keep_checkpoints
    # the backbone is in no checkpoint: a resumed run must build the same one
    may_differ = (MAY_DIFFER | {"cache", "cache_gb"}) - {"pretrained", "backbone_weights"}
    try:
        return RunFolder(config.output, values, resume=config.resume, may_differ=may_differ, keep=keep)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def chosen_heads(config: Config) -> list[HeadChoice]:
    """The heads that were asked for."""
    return [parse_head(text) for word in config.heads for text in (list_heads() if word == "all" else [word])]


def leave_out(accelerator: Accelerator, config: Config, choice: HeadChoice, error: ValueError) -> bool:
    """Go on without a head that does not fit the backbone, unless it was asked for by name."""
    if str(choice) in (str(parse_head(word)) for word in config.heads if word != "all"):
        return False
    accelerator.print(f"left out: {choice}, because {error}")
    return True


def create_head(config: Config, num_classes: int, choice: HeadChoice) -> SegmentationModel:
    """The model of one head."""
    options = {**choice.create_kwargs(), **config.model_options()}
    return create_model(config.backbone, choice.head, num_classes, **options)


def prepare_probe(accelerator: Accelerator, config: Config, probe: Probe) -> None:
    """Give a head its optimizer; under several processes its gradients are averaged over them (DDP)."""
    probe.model.to(accelerator.device)
    optimizer = create_optimizer(
        probe.model,
        config.optimizer,
        learning_rate=probe.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
    )
    probe.prepared, probe.optimizer = accelerator.prepare(probe.model, optimizer)


def scheduled(config: Config, iteration: int, learning_rate: float) -> float:
    """The rate of one update of a head."""
    return poly_learning_rate(
        iteration,
        learning_rate=learning_rate,
        max_iterations=config.iterations,
        power=config.power,
        min_learning_rate=config.min_learning_rate,
        warmup_iterations=config.warmup_iterations,
    )


def sampler(config: Config, dataset: SegmentationDataset, start: int) -> RoundSampler:
    """The batches of the run from iteration `start` on."""
    parts = config.gradient_accumulation
    return RoundSampler(
        len(dataset),
        config.batch_size // parts,
        seed=config.seed,
        num_iterations=config.iterations * parts,
        distinct=config.distinct_batches,
        start_iteration=start * parts,
    )


def training_loader(
    config: Config, samples: TrainingSamples, cache: FeatureCache | None, start: int
) -> DataLoader[Any]:
    """Crops of the data set from iteration `start` on, or the maps that the cache has of them."""
    source: Any = samples if cache is None else CachedSamples(samples, cache)
    return DataLoader(
        source,
        batch_sampler=sampler(config, samples.dataset, start),
        collate_fn=collate_samples if cache is None else as_it_is,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def open_cache(
    accelerator: Accelerator, config: Config, shared: SharedBackbone, samples: TrainingSamples
) -> FeatureCache:
    """The cache of this backbone on these samples, if there is room for it."""
    size = config.crop_size
    with accelerator.autocast():
        maps = shared.compute(torch.zeros(1, 3, size, size, device=accelerator.device))
    about = {
        "backbone": config.backbone,
        "weights": fingerprint_module(shared.backbone),
        "levels": shared.backbone.indices,
        "dataset": config.dataset,
        "samples": fingerprint_data(samples.dataset),
        "scale": config.scale,
        "crop_size": size,
        "seed": config.seed,
        "maps": [f"{x.dtype} {tuple(x.shape[1:])}" for x in maps],
        # what changes the last bits of a sum
        "precision": config.mixed_precision,
        "channels_last": shared.channels_last,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else None,
        "torch": torch.__version__,
    }
    cache = FeatureCache(config.cache or "", about)
    batches = sampler(config, samples.dataset, 0)
    processes = range(accelerator.num_processes)
    pieces = (keys for process in processes for keys in batches.parts(process, len(processes)))
    bytes_per_image = sum(x.numel() * x.element_size() for x in maps) + size * size
    with accelerator.main_process_first():
        cache.prepare(pieces, bytes_per_image, round(config.cache_gb * 1e9))
    return cache


def save(config: Config, shared: SharedBackbone, probes: list[Probe], rows: list[dict[str, Any]]) -> None:
    """Write every head, and a whole model of each at its best rate."""
    save_probes(config.output, shared, probes)
    for probe, row in zip(probes, rows, strict=True):
        if row["best"]:
            folder = config.output / "models" / re.sub(r"[^\w.=+-]+", "_", str(probe.choice))
            join_head(config.output, probe.slug).save_pretrained(folder)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEMO if "--demo" in sys.argv else Config(), description=__doc__))
