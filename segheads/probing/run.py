"""A whole run of probes, from the configuration to the table."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from segheads.build import create_model
from segheads.card import write_card_of
from segheads.card.card import keep_card
from segheads.data import EvaluationSamples, PhotometricNormalize, RareClasses, TrainingSamples, collate_samples
from segheads.data.samples import CROPS
from segheads.errors import options_become_parts
from segheads.evaluation.report import score_record, scores, write_results
from segheads.files import whole_folder
from segheads.inference.windows import pair
from segheads.model import SegmentationModel
from segheads.plan import HeadChoice
from segheads.probing.backbone import SharedBackbone
from segheads.probing.config import PROBES_MAY_DIFFER, ProbeConfig
from segheads.probing.evaluate import evaluate_probes
from segheads.probing.features import (
    CachedSamples,
    FeatureCache,
    RoundSampler,
    as_it_is,
    fingerprint_data,
    fingerprint_module,
)
from segheads.probing.learner import ProbeLearner, feature_batches
from segheads.probing.probes import Probe, build_probes
from segheads.probing.report import probe_markdown, probe_rows, write_probe_report
from segheads.probing.saving import join_head, save_probes
from segheads.training.batches import batch_loader, sampler_options, training_samples
from segheads.training.config import as_launched
from segheads.training.crop_sheet import crops_words, show_crops
from segheads.training.loop import train
from segheads.training.machine import paths_line
from segheads.training.run import evaluation_samples, shown
from segheads.training.setup import Run, label_map_of, open_run

log = logging.getLogger(__name__)


def run_probing(config: ProbeConfig) -> list[dict[str, Any]]:
    """Train all heads on one frozen backbone, evaluate them, write the table and the heads.

    Args:
        config: Every number of the run.

    Returns:
        What `probe_rows` gives, in every process.

    Raises:
        OptionError: An option is out of range, unknown, or does not fit the others.
        SegheadsError: As `segheads.training.run_training` does, but for a loss that is not finite.
    """
    config = as_launched(config)
    config.check()
    with open_run(config, may_differ=PROBES_MAY_DIFFER) as run:
        with options_become_parts():
            shared, probes, samples, cache = _build(run, config)
        run.check_processes(*(probe.model for probe in probes))
        mean, std = (shared.backbone.data_config[key] for key in ("mean", "std"))
        images, some = evaluation_samples(run, mean, std)
        evaluate = partial(
            evaluate_probes,
            run.accelerator,
            shared,
            probes,
            protocol=shown(config),
            workers=config.machine.workers,
        )
        start = run.start()
        prepare = PhotometricNormalize(mean, std).to(run.accelerator.device)
        batches = sampler(config, len(samples), start, run.rare_classes)
        show_crops(run, samples, batches, prepare)
        loader = run.accelerator.prepare(_loader(config, samples, batches, cache))
        if start:
            run.folder.load(run.accelerator, start)
        _say(run, config, probes)
        learner = ProbeLearner(
            run.accelerator,
            shared,
            probes,
            schedule=partial(_rate, config),
            seed=config.seed,
            max_grad_norm=config.optimization.max_grad_norm,
            clip_mode=config.optimization.clip_mode,
            records=run.folder.records(),
        )
        features = feature_batches(
            run.accelerator, loader, prepare, shared, cache=cache, channels_last=shared.channels_last
        )
        train(run, learner, features, config.loop, start=start, evaluate=partial(_evaluated, probes, evaluate, some))
        names = run.validation_set.class_names
        results = evaluate(images)
        rows = probe_rows(probes, [score_record(of_probe, names) for of_probe in results])
        if run.accelerator.is_main_process:
            _report(run, config, shared, probes, rows, results)
    return rows


def _build(run: Run, config: ProbeConfig) -> tuple[SharedBackbone, list[Probe], TrainingSamples, FeatureCache | None]:
    """Backbone, heads with their optimizers, crops, and the cache of the backbone's maps."""
    training_samples(config, run.training_set)  # refuses what is out of range, as does the next
    sampler(config, len(run.training_set))
    shared, probes = build_probes(
        partial(create_head, run.model_config(config), run.num_classes),
        config.choices(),
        config.learning_rates,
        seed=config.seed,
        channels_last=config.machine.channels_last,
        leave_out=partial(_leave_out, config),
    )
    for probe in probes:  # under several processes its gradients are averaged over them (DDP)
        optimizer = config.optimization.create(probe.model.to(run.accelerator.device), probe.learning_rate)
        probe.model.classes, probe.model.protocol = run.validation_set.classes, config.protocol
        probe.model.label_map = label_map_of(run.training_set)
        probe.prepared, probe.optimizer = run.accelerator.prepare(probe.model, optimizer)
    shared.to(run.accelerator.device)
    samples = training_samples(config, run.training_set, shared.backbone.data_config["mean"])
    if config.augmentation.rare_class_temperature is not None:
        run.look()  # the cache is asked for the images that are drawn
    cache = None if config.cache is None else open_cache(run.accelerator, config, shared, samples, run.rare_classes)
    return shared, probes, samples, cache


def _say(run: Run, config: ProbeConfig, probes: list[Probe]) -> None:
    """What begins, in words."""
    log.info(
        f"{len(probes)} heads on {config.model.backbone}, which is frozen: {len(run.training_set)} training and "
        f"{len(run.validation_set)} validation images of {run.training_set.num_classes} classes; "
        f"{run.accelerator.num_processes} process(es) on {run.accelerator.device.type}\n"
        f"{run.batches_line()}\n"
        f"{paths_line(run.accelerator, [probe.model for probe in probes], run.images_per_step())}{crops_words(run)}"
    )


def _leave_out(config: ProbeConfig, choice: HeadChoice, error: ValueError) -> bool:
    """Go on without a head that does not fit the backbone, unless it was asked for by name."""
    if config.names(choice):
        return False
    log.info("left out: %s, because %s", choice, error)
    return True


def create_head(config: ProbeConfig, num_classes: int, choice: HeadChoice) -> SegmentationModel:
    """The model of one head.

    Args:
        config: Says the backbone.
        num_classes: Of the data set.
        choice: The head.
    """
    options = {**choice.create_kwargs(), **config.model_options(num_classes)}
    return create_model(config.model.backbone, choice.head, num_classes, **options)


def _rate(config: ProbeConfig, iteration: int, learning_rate: float) -> float:
    return config.optimization.rate_at(iteration, config.loop.iterations, learning_rate)


def _evaluated(probes: list[Probe], evaluate: Any, samples: EvaluationSamples) -> dict[str, Any]:
    """The scores of every head that learns, for the log."""
    results = zip(probes, evaluate(samples), strict=True)
    return {"scores": {probe.name: scores(found) for probe, found in results if probe.diverged_at is None}}


def sampler(config: ProbeConfig, length: int, start: int = 0, rare: RareClasses | None = None) -> RoundSampler:
    """The batches of the run from iteration `start` on.

    Args:
        config: Numbers of the run.
        length: How many samples there are.
        start: Number of updates made before.
        rare: Draws images by their classes.

    Raises:
        ValueError: If a size is out of range.
    """
    return RoundSampler(length, distinct=config.distinct_batches, **sampler_options(config, start), rare=rare)


def _loader(config: ProbeConfig, samples: TrainingSamples, batches: RoundSampler, cache: FeatureCache | None) -> Any:
    """Crops of the data set, or the maps that the cache has of them."""
    if cache is None:
        return batch_loader(config, samples, batches, collate_samples)
    return batch_loader(config, CachedSamples(samples, cache), batches, as_it_is)


def open_cache(
    accelerator: Accelerator,
    config: ProbeConfig,
    shared: SharedBackbone,
    samples: TrainingSamples,
    rare: RareClasses | None = None,
) -> FeatureCache:
    """The cache of this backbone on these samples, if there is room for it.

    Args:
        accelerator: Tells device, precision and processes.
        config: Numbers of the run.
        shared: The backbone.
        samples: What it sees.
        rare: Draws images by their classes.

    Raises:
        ValueError: If there is no room.
    """
    height, width = pair("crop_size", config.crop_size)
    with accelerator.autocast():
        maps = shared.compute(torch.zeros(1, 3, height, width, device=accelerator.device))
    about = {
        "backbone": config.model.backbone,
        "weights": fingerprint_module(shared.backbone),
        "levels": shared.backbone.indices,
        "dataset": config.data.dataset,
        "samples": fingerprint_data(samples.dataset),
        "scale": config.protocol.scale,
        "crop_size": config.crop_size,
        "seed": [config.seed, CROPS],
        "maps": [f"{x.dtype} {tuple(x.shape[1:])}" for x in maps],
        **({} if config.training_flip else {"training_flip": False}),
        **({"flip_pairs": samples.crop.flip_pairs} if samples.crop.flip_pairs else {}),
        **({"augmentation": asked} if (asked := config.augmentation.changed_values()) else {}),
        # what changes the last bits of a sum
        "precision": config.machine.mixed_precision,
        "channels_last": shared.channels_last,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else None,
        "torch": torch.__version__,
    }
    cache = FeatureCache(config.cache or "", about)
    batches, processes = sampler(config, len(samples), rare=rare), accelerator.num_processes
    pieces = (keys for process in range(processes) for keys in batches.parts(process, processes))
    bytes_per_image = sum(x.numel() * x.element_size() for x in maps)
    bytes_per_image += height * width * (1 if samples.dataset.num_classes <= 255 else 2)
    with accelerator.main_process_first():
        cache.prepare(pieces, bytes_per_image, round(config.cache_gb * 1e9))
    return cache


def _report(
    run: Run,
    config: ProbeConfig,
    shared: SharedBackbone,
    probes: list[Probe],
    rows: list[dict[str, Any]],
    results: Sequence[Mapping[str, Tensor]],
) -> None:
    """Write every head, a whole model of each at its best rate, and the table; to be called by one process."""
    save_probes(config.output, shared, probes)
    for probe, row, found in zip(probes, rows, results, strict=True):
        if row["best"]:
            folder = config.output / "models" / re.sub(r"[^\w.=+-]+", "_", str(probe.choice))
            model = join_head(config.output, probe.slug)
            with whole_folder(folder) as temporary:
                keep_card(folder, temporary)
                model.save_pretrained(temporary)
                write_results(temporary, found, run.validation_set, iteration=config.loop.iterations)
            write_card_of(folder, folder, model)
    title = f"Heads on a frozen {config.model.backbone}, {config.data.dataset}, {config.loop.iterations} iterations"
    write_probe_report(config.output, rows, run.folder.records(), title)
    log.info("%s\ntables, curves and models are in %s", probe_markdown(rows, title), config.output)
