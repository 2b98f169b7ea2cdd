"""Train, evaluate and picture a MeanShifter: any head on any timm backbone.

    accelerate launch recipes/meanshifter_ade20k.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/meanshifter_ade20k.py --demo

Needs ADE20K (`--download` fetches it, about 1 GB) and the backbone's weights from the hub (`--backbone-weights PATH`
or `--no-pretrained` without a network); the demo needs neither. Every field below is an option; `--help` lists them.

Results go to `--output`: the model (for `SegmentationModel.from_pretrained`), config.json, metrics.jsonl, results.json,
per_class.md, curves.png, predictions.png, TensorBoard files, and the last checkpoints, from which `--resume` goes on.

The defaults are the author's configuration (ViT-Ti/16, one shift, d_ms 192, SGD, 160k iterations, loss over all pixels)
at Segmenter's batch size of 8. The thesis' own runs had one image on one GPU: `--batch-size 1`.

Expected mIoU: the thesis reports 31.05 (31.44 for its own Segmenter run) at batch size 1, Segmenter's paper 39.03 for
Seg-Ti/16 at batch size 8. Ours at full length, and hours and memory on a GPU: not yet measured.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

from segheads import PretrainedWeightsError, SegmentationModel, create_model
from segheads.data import (
    ADE20K,
    CamVid,
    IterationSampler,
    PhotometricNormalize,
    RandomScaleCrop,
    Scenes,
    SegmentationDataset,
    TrainingSamples,
    collate_samples,
    download_ade20k,
)
from segheads.functional.upsample import Reduction
from segheads.training import (
    EvaluationSamples,
    RunFolder,
    create_optimizer,
    evaluate,
    poly_learning_rate,
    predict,
    scores,
    train,
    training_batches,
    write_report,
)


@dataclass(frozen=True)
class Config:
    """Every number of the run."""

    demo: bool = False
    """Train a small ViT from random weights on drawn scenes, in one to two minutes on two CPU cores."""
    output: Path = Path("runs/meanshifter_ade20k")
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in `output`."""

    # The model
    backbone: str = "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    """Any timm architecture. The default is Segmenter's Ti/16: AugReg, ImageNet-21k, then ImageNet-1k at 384."""
    pretrained: bool = True
    """Fetch timm's weights of the backbone; --no-pretrained starts from random ones."""
    backbone_weights: Path | None = None
    """A local checkpoint of the backbone, instead of the hub's."""
    patch_size: int | None = None
    """Side of a ViT's patches, pixels; None leaves the architecture's."""
    depth: int | None = None
    """Number of a ViT's blocks; None leaves the architecture's."""
    head: str = "mean_shift"
    """Any of segheads.list_heads()."""
    shift_layers: int = 1
    """L_ms, for the mean_shift head: the thesis' best; its class defaults to 3 and its configuration to 2."""
    shift_channels: int | None = 192
    """d_ms, for the mean_shift head; None means the backbone's width."""
    decoder: str = "linear"
    """The head after the shift, for the mean_shift head."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the backbone."""
    loss_reduction: Reduction = "all"
    """Divide the loss by all pixels, as the author's code does, or by the valid ones."""

    # The data
    dataset: Literal["ade20k", "camvid", "scenes"] = "ade20k"
    """ADEChallengeData2016, CamVid, or scenes drawn by the code."""
    data_root: Path | None = None
    """Where the data set lies; None means data/ADEChallengeData2016 or data/camvid."""
    download: bool = False
    """Fetch ADE20K into the data root if it is not there."""
    scale: tuple[int, int] = (2048, 512)
    """Longest and shortest side, pixels: images are resized into it for evaluation, and about it for training."""
    crop_size: int = 512
    """Side of the training crops, pixels."""
    scenes_size: int = 128
    """Side of the drawn scenes, pixels."""

    # The optimisation
    iterations: int = 160_000
    """Updates of the weights."""
    batch_size: int = 8
    """Images of one update, over all processes and accumulated batches: Segmenter's 8; the thesis' runs had 1."""
    gradient_accumulation: int = 1
    """Batches into which each update is cut."""
    optimizer: str = "momentum"
    """In timm's words: momentum is the author's SGD, sgd is Segmenter's (with Nesterov), adamw, and the rest."""
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    """The rate at the end of the decay; Segmenter has 1e-5."""
    power: float = 0.9
    """Exponent of the decay."""
    warmup_iterations: int = 0
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    """Clip the norm of the gradient."""
    seed: int = 0

    # The machine
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    """torch.compile the training step."""
    threads: int | None = None
    """CPU threads of each training process; None shares all cores out (accelerate launch alone would give 1)."""
    workers: int = 4
    """Processes that load images, for each process that trains."""

    # The evaluation and the log
    window: int | None = 512
    """Side of the sliding window, pixels; None shows whole images."""
    stride: int | None = 480
    """Pixels between windows."""
    evaluate_every: int = 16_000
    evaluate_images: int | None = None
    """Evaluate on the first so many images during training; the last evaluation is always on all."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    tracker: str = "tensorboard"
    """A tracker of Accelerate, or none."""
    pictures: int = 6
    """Rows of the picture sheet."""


DEMO = Config(
    demo=True,
    output=Path("runs/demo"),
    backbone="vit_tiny_patch16_224",
    pretrained=False,
    patch_size=8,
    depth=4,
    dataset="scenes",
    scenes_size=96,
    scale=(96, 96),
    crop_size=96,
    drop_path_rate=0.0,
    iterations=300,
    batch_size=16,
    optimizer="adamw",
    learning_rate=1e-3,
    min_learning_rate=0.0,
    warmup_iterations=50,
    weight_decay=0.05,
    max_grad_norm=1.0,
    workers=0,
    window=None,
    stride=None,
    evaluate_every=0,
    checkpoint_every=100,
    log_every=10,
)

# A resumed run may change where things are and how often it reports, but nothing that its weights depend on.
MAY_DIFFER = {
    *(
        "output",
        "resume",
        "data_root",
        "download",
        "backbone_weights",
        "pretrained",
        "workers",
        "threads",
        "tracker",
        "pictures",
    ),
    *("evaluate_every", "evaluate_images", "checkpoint_every", "keep_checkpoints", "log_every", "window", "stride"),
}


def main(config: Config) -> None:
    """Run the recipe, top-down."""
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
    model = build_model(config, training_set.num_classes)
    optimizer = create_optimizer(
        model,
        config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
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
    )
    if config.compile:
        model.compile()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    set_seed(config.seed, device_specific=True)  # each process drops other paths
    if start:
        run.load(accelerator, start)

    evaluate_now = partial(
        evaluate, accelerator, model, samples, window=config.window, stride=config.stride, workers=config.workers
    )
    try:
        train(
            accelerator,
            prepared,
            optimizer,
            training_batches(loader, prepare),
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

    results = evaluate_now()
    accelerator.log(scores(results), step=config.iterations)
    if accelerator.is_main_process:
        run.log({"iteration": config.iterations, **scores(results)})
        report(accelerator, config, run, model, samples, results)
    accelerator.wait_for_everyone()  # a process that leaves early can hang the others as they shut down
    accelerator.end_training()


def open_run(accelerator: Accelerator, config: Config) -> RunFolder:
    """The run's folder, checked but not yet written to."""
    parts = config.gradient_accumulation * accelerator.num_processes
    if config.batch_size < 1 or config.batch_size % parts:
        raise SystemExit(
            f"error: --batch-size {config.batch_size} is over all {accelerator.num_processes} processes and "
            f"{config.gradient_accumulation} accumulated batches, and must be a multiple of {parts}"
        )
    values, keep = as_json(config), config.keep_checkpoints
    try:
        return RunFolder(config.output, values, resume=config.resume, may_differ=MAY_DIFFER, keep=keep)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def begin_run(accelerator: Accelerator, config: Config, run: RunFolder) -> int:
    """Write the configuration and start the trackers; returns the iteration to start from."""
    accelerator.wait_for_everyone()  # all have looked before the first writes
    if accelerator.is_main_process:
        run.start(as_json(config))
    accelerator.wait_for_everyone()
    start = run.latest()
    if config.resume:
        accelerator.print(f"resuming {config.output} at iteration {start} of {config.iterations}")
    accelerator.init_trackers(
        "tensorboard" if config.tracker == "tensorboard" else "segheads",  # a folder of the run, or a project elsewhere
        config={key: v if isinstance(v, (int, float, str)) else str(v) for key, v in as_json(config).items()},
        init_kwargs={"tensorboard": {"purge_step": start}},
    )
    return start


def as_json(config: Config) -> dict[str, Any]:
    """The configuration in JSON values."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(config).items()}


def load_data(accelerator: Accelerator, config: Config) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation set; the run ends here, before any model is built, where they are missing."""
    if config.dataset == "scenes":
        size = (config.scenes_size, config.scenes_size)
        return Scenes("train", size=size, seed=config.seed), Scenes("val", size=size, length=100, seed=config.seed)
    try:
        if config.dataset == "camvid":
            root = config.data_root or Path("data/camvid")
            return CamVid(root, "train"), CamVid(root, "val")
        root = config.data_root or Path("data/ADEChallengeData2016")
        if config.download:
            with accelerator.main_process_first():
                download_ade20k(root.parent if root.name == "ADEChallengeData2016" else root)
        return ADE20K(root, "train"), ADE20K(root, "val")
    except (OSError, ValueError) as error:
        offers = "--data-root PATH says where it is"
        if config.dataset == "ade20k":
            offers += ", --download fetches it (about 1 GB)"
        raise SystemExit(f"error: {error}\n{offers}, and --demo trains without any data") from error


def build_model(config: Config, num_classes: int) -> SegmentationModel:
    """The backbone, with weights or without, and the head."""
    shift = {"num_layers": config.shift_layers, "shift_channels": config.shift_channels, "decoder": config.decoder}
    sizes = {"patch_size": config.patch_size, "depth": config.depth}
    try:
        return create_model(
            config.backbone,
            config.head,
            num_classes,
            pretrained=config.backbone_weights or config.pretrained,
            backbone_kwargs={
                "img_size": config.crop_size,
                "drop_path_rate": config.drop_path_rate,
                "model_kwargs": {key: value for key, value in sizes.items() if value is not None},
            },
            head_kwargs=shift if config.head == "mean_shift" else {},
            loss_reduction=config.loss_reduction,
        )
    except (PretrainedWeightsError, FileNotFoundError) as error:
        raise SystemExit(
            f"error: {error}\n--backbone-weights PATH takes a local checkpoint, "
            "--no-pretrained starts from random weights"
        ) from error
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def training_loader(config: Config, dataset: SegmentationDataset, start: int) -> DataLoader[Any]:
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


def report(
    accelerator: Accelerator,
    config: Config,
    run: RunFolder,
    model: SegmentationModel,
    samples: EvaluationSamples,
    results: dict[str, torch.Tensor],
) -> None:
    """Write the model, the tables and the pictures of a finished run."""
    model.save_pretrained(run.path / "model")
    model.eval()
    dataset, rows = samples.dataset, []
    for index in np.linspace(0, len(dataset) - 1, min(config.pictures, len(dataset))).astype(int).tolist():
        image, labels = dataset.read(index)
        prediction = predict(accelerator, model, samples[index][0], labels.shape, config.window, config.stride)
        rows.append((dataset.name(index), np.array(image), labels.numpy(), prediction.cpu().numpy()))
    write_report(run.path, results, run.records(), dataset, rows)
    print(", ".join(f"{name} {value:.4f}" for name, value in scores(results).items()))
    print(f"model, tables and pictures are in {run.path}")


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEMO if "--demo" in sys.argv else Config(), description=__doc__))
