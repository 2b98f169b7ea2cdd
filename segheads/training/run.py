"""A whole run, from the configuration to the report: what recipes share."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segheads.data import (
    DATASETS,
    DataConfig,
    EvaluationSamples,
    IterationSampler,
    PhotometricNormalize,
    RandomScaleCrop,
    SegmentationDataset,
    TrainingSamples,
    collate_samples,
    open_dataset,
)
from segheads.errors import OptionError, PretrainedWeightsError, SegheadsError
from segheads.evaluation.evaluate import evaluate, predict, predict_uncertainty
from segheads.inference.protocol import InferenceProtocol
from segheads.model import SegmentationModel
from segheads.training.config import MAY_DIFFER, TrainingConfig
from segheads.training.loop import train, training_batches
from segheads.training.optimization import create_optimizer, poly_learning_rate
from segheads.training.report import plot_uncertainty, scores, write_report
from segheads.training.run_folder import RunFolder

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def run_training(
    config: ConfigT,
    build_model: Callable[[ConfigT, int], SegmentationModel],
    *,
    backbone_lr_scale: float = 1.0,
    is_last: bool = True,
) -> dict[str, Tensor]:
    """Train, evaluate and report, in a process of its own or under `accelerate launch`.

    The run's folder, `config.output`, ends up with the model, config.json, metrics.jsonl, results.json, per_class.md,
    curves.png, predictions.png, TensorBoard files and the last checkpoints; with `calibration`, reliability.png, too.

    Args:
        config: Every number of the run.
        build_model: Called as `build_model(config, num_classes)` once the data is there and the seed is set.
        backbone_lr_scale: Learning rate of the backbone over that of the rest.
        is_last: Whether the processes part afterwards; False where another training follows.

    Returns:
        What `evaluate` gave for the whole validation set at the end, in every process; `scores` picks mIoU from it.

    Raises:
        SystemExit: With one line on what is wrong and which option helps: a folder that holds a run, no data, no
            pretrained weights, parts that do not fit, a loss that is not finite.
    """
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

    set_seed(config.seed)
    with errors_in_a_line():
        model = build_model(config, training_set.num_classes)
        channels_last = is_convolutional(model.backbone) if config.channels_last is None else config.channels_last
        model.to(accelerator.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        optimizer = create_optimizer(
            model,
            config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            backbone_lr_scale=backbone_lr_scale,
        )
    schedule = partial(
        poly_learning_rate,
        learning_rate=config.learning_rate,
        max_iterations=config.iterations,
        power=config.power,
        min_learning_rate=config.min_learning_rate,
        warmup_iterations=config.warmup_iterations,
    )
    start = begin_run(accelerator, config, run)  # writes; all that may be missing is there
    loader = training_loader(config, training_set, start)
    mean, std = model.data_config["mean"], model.data_config["std"]
    prepare = PhotometricNormalize(mean, std).to(accelerator.device)
    samples = EvaluationSamples(validation_set, mean, std, config.scale)

    accelerator.print(
        f"{config.head} on {config.backbone}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{len(training_set)} training and {len(validation_set)} validation images of {model.num_classes} classes; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        f"{', channels last' if channels_last else ''}\n"
        f"{config.optimizer}: learning rate {config.learning_rate:g} (backbone times {backbone_lr_scale:g}), "
        f"weight decay {config.weight_decay:g}, gradients clipped at {config.max_grad_norm}, "
        f"drop path {config.drop_path_rate:g}"
    )
    if config.compile:
        model.compile()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    set_seed(config.seed, device_specific=True)  # each process drops other paths
    if start:
        run.load(accelerator, start)

    evaluate_now = partial(evaluate, accelerator, model, samples, protocol_of(config), workers=config.workers)
    try:
        train(
            accelerator,
            prepared,
            optimizer,
            training_batches(loader, prepare, channels_last=channels_last),
            run,
            schedule=schedule,
            start=start,
            iterations=config.iterations,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            max_grad_norm=config.max_grad_norm,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            evaluate_every=config.evaluate_every,
            evaluate=lambda: scores(evaluate_now(limit=config.evaluate_images)),
        )
    except FloatingPointError as error:
        raise SystemExit(f"error: {error} (iteration {run.latest()} in {config.output / 'checkpoints'})") from error

    results = evaluate_now(calibration=config.calibration)
    accelerator.log(scores(results), step=config.iterations)
    if accelerator.is_main_process:
        run.log({"iteration": config.iterations, **scores(results)})
        report(accelerator, config, run, model, samples, results)
    accelerator.wait_for_everyone()  # a process that leaves early can hang the others as they shut down
    if is_last:
        accelerator.end_training()
    else:  # without taking down what connects the processes
        for tracker in accelerator.trackers:
            tracker.finish()
    return results


def open_run(accelerator: Accelerator, config: TrainingConfig) -> RunFolder:
    """The run's folder, checked but not yet written to."""
    parts = config.gradient_accumulation * accelerator.num_processes
    if config.batch_size < 1 or config.batch_size % parts:
        raise SystemExit(
            f"error: --batch-size {config.batch_size} is over all {accelerator.num_processes} processes and "
            f"{config.gradient_accumulation} accumulated batches, and must be a multiple of {parts}"
        )
    values, keep = config.as_json(), config.keep_checkpoints
    options: dict[str, Any] = {"may_differ": MAY_DIFFER, "defaults": config.defaults_as_json()}
    try:
        return RunFolder(config.output, values, resume=config.resume, keep=keep, **options)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def begin_run(accelerator: Accelerator, config: TrainingConfig, run: RunFolder) -> int:
    """Write the configuration and start the trackers; returns the iteration to start from."""
    accelerator.wait_for_everyone()  # all have looked before the first writes
    if accelerator.is_main_process:
        run.start(config.as_json())
    accelerator.wait_for_everyone()
    start = run.latest()
    if config.resume:
        accelerator.print(f"resuming {config.output} at iteration {start} of {config.iterations}")
    accelerator.init_trackers(
        "tensorboard" if config.tracker == "tensorboard" else "segheads",  # a folder of the run, or a project elsewhere
        config={key: v if isinstance(v, (int, float, str)) else str(v) for key, v in config.as_json().items()},
        init_kwargs={"tensorboard": {"purge_step": start}},
    )
    return start


def load_data(accelerator: Accelerator, config: TrainingConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation set; the run ends here, before any model is built, where they are missing."""
    data = config.data_config()
    with data_errors_in_a_line(data), accelerator.main_process_first() if data.download else nullcontext():
        return open_dataset(data, "train", seed=config.seed), open_dataset(data, "val", seed=config.seed)


@contextmanager
def data_errors_in_a_line(data: DataConfig) -> Iterator[None]:
    """What goes wrong while a data set is opened, without a traceback and with the options that help."""
    try:
        yield
    except OptionError as error:
        raise SystemExit(f"error: {error}") from error
    except (SegheadsError, OSError) as error:
        offers = "--data-root PATH says where it is"
        if size := DATASETS[data.dataset].download_size:
            offers += f", --download fetches it ({size})"
        raise SystemExit(f"error: {error}\n{offers}, and --demo trains without any data") from error


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """What goes wrong while a model is built, without a traceback and with the options that help."""
    try:
        yield
    except (PretrainedWeightsError, FileNotFoundError) as error:
        raise SystemExit(
            f"error: {error}\n--backbone-weights PATH takes a local checkpoint, "
            "--no-pretrained starts from random weights"
        ) from error
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether a quarter of the layers or more are convolutions: ConvNeXt has 2 of 5, a ViT or Swin its patches' one."""
    layers = [layer for layer in backbone.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return 4 * sum(isinstance(layer, nn.Conv2d) for layer in layers) >= max(len(layers), 1)


def training_loader(config: TrainingConfig, dataset: SegmentationDataset, start: int) -> DataLoader[Any]:
    """Crops of the data set from iteration `start` on, one batch for each update and accumulated part."""
    parts = config.gradient_accumulation
    samples = TrainingSamples(dataset, RandomScaleCrop(config.crop_size, scale=config.scale), seed=config.seed)
    sampler = IterationSampler(
        len(dataset),
        config.batch_size // parts,
        seed=config.seed,
        num_iterations=config.iterations * parts,
        start_iteration=start * parts,
    )
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=collate_samples,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each new iterator draws from the random state that a checkpoint keeps
    )


def protocol_of(config: TrainingConfig) -> InferenceProtocol:
    """How a run shows images to its model; those of a data set are resized as they are read."""
    return InferenceProtocol(window=config.window, stride=config.stride)


def report(
    accelerator: Accelerator,
    config: TrainingConfig,
    run: RunFolder,
    model: SegmentationModel,
    samples: EvaluationSamples,
    results: dict[str, Tensor],
) -> None:
    """Write the model, the tables and the pictures of a finished run."""
    model.classes = samples.dataset.classes
    model.protocol = dataclasses.replace(protocol_of(config), scale=config.scale)
    model.save_pretrained(run.path / "model")
    model.eval()
    dataset, rows, doubts = samples.dataset, [], []
    for index in np.linspace(0, len(dataset) - 1, min(config.pictures, len(dataset))).astype(int).tolist():
        (image, labels), tensor = dataset.read(index), samples[index][0]
        prediction = predict(accelerator, model, tensor, labels.shape, protocol_of(config))
        row = (dataset.name(index), np.array(image), labels.numpy(), prediction.cpu().numpy())
        rows.append(row)
        if model.head.is_ensemble:
            doubts.append((*row, predict_uncertainty(accelerator, model, tensor, labels.shape, protocol_of(config))))
    write_report(run.path, results, run.records(), dataset, rows)
    if doubts:
        plot_uncertainty(doubts, dataset, run.path / "uncertainty.png")
    print(", ".join(f"{name} {value:.4f}" for name, value in scores(results).items()))
    print(f"model, tables and pictures are in {run.path}")
