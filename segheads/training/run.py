"""A whole training of one model, from the configuration to the report."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from segheads.card import write_card_of
from segheads.card.card import keep_card
from segheads.checkpointing import start_grad_checkpointing
from segheads.data import EvaluationSamples, SubsetDataset
from segheads.drawing import picture_or_warning
from segheads.errors import options_become_parts
from segheads.evaluation.evaluate import evaluate, predict_uncertainty, warn_of_squashing
from segheads.evaluation.plots import Row, plot_uncertainty
from segheads.evaluation.report import score_line
from segheads.files import whole_folder
from segheads.inference.protocol import InferenceProtocol
from segheads.model import SegmentationModel
from segheads.saving import check_savable
from segheads.training.batches import normalization, training_batches, training_loader
from segheads.training.config import JUDGES, MAY_DIFFER, TrainingConfig, as_launched
from segheads.training.crop_sheet import crops_words, show_crops
from segheads.training.extending import extended, refuse_unfinished, tell_of_extension
from segheads.training.init_from import init_from
from segheads.training.keeping import Keeper
from segheads.training.loop import ModelLearner, train
from segheads.training.machine import is_convolutional, paths_line, share_batch_norms
from segheads.training.nonfinite import FiniteSteps, explain_failure
from segheads.training.report import write_report
from segheads.training.setup import Run, open_run
from segheads.training.watching import draw_predictions, picked_samples, validation_record, write_class_iou

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)
log = logging.getLogger(__name__)
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # Accelerate's words


def run_training(
    config: ConfigT, build_model: Callable[[ConfigT, int], SegmentationModel], *, is_last: bool = True
) -> dict[str, Tensor]:
    """Train, evaluate and report, in a process of its own or under `accelerate launch`.

    The run's folder, `config.output`, ends up with the model, config.json, metrics.jsonl, results.json, per_class.md,
    augment.png, curves.png, predictions.png, TensorBoard files and the last checkpoints; with `calibration`,
    reliability.png, too.

    Args:
        config: Every number of the run.
        build_model: Called as `build_model(config, num_classes)` once the data is there and the seed is set.
        is_last: Whether the processes part afterwards; False where another training follows.

    Returns:
        What `evaluate` gave for the whole validation set at the end, in every process; `scores` picks mIoU from it.

    Raises:
        OptionError: An option is out of range, unknown, or does not fit the others.
        RunExistsError: The folder holds a run, and `resume` is False.
        DivergedError: A loss or a weight is not finite; the last checkpoint is good.
        SegheadsError: Data or pretrained weights are missing or damaged.
    """
    config, length = extended(as_launched(config))
    config.keeping.check(config.loop.evaluate_every)
    may_differ = MAY_DIFFER if config.keeping.best is None else MAY_DIFFER - JUDGES
    longer = set() if length is None else {"iterations"}
    with open_run(config, may_differ=may_differ | longer, is_last=is_last) as run:
        if length is not None:
            refuse_unfinished(run.folder, run.resumes_at, length)
            tell_of_extension(config.optimization, length, config.loop.iterations)
        set_seed(config.seed)
        with options_become_parts():
            model = build_model(run.model_config(config), run.num_classes)
            config.protocol.check_threshold(model.num_classes)
        warn_of_squashing(model, config.protocol)
        run.check_labels(model.ignore_index)
        run.check_processes(model)
        run.tell_input(model)
        with options_become_parts():
            if model.plan is not None:
                check_savable(model.plan, config.protocol, model.data_config)  # or the end of the run would
        if config.model.init_from and not run.resumes_at:  # a checkpoint has its own weights
            run.origin = init_from(model, config.model.init_from, run.training_set.classes)
        mean, std = model.data_config["mean"], model.data_config["std"]
        samples, some = evaluation_samples(run, mean, std)
        names = run.validation_set.class_names
        evaluate_now = partial(evaluate, run.accelerator, model, protocol=shown(config), workers=config.machine.workers)
        done, iteration = _train(run, model, lambda: validation_record(evaluate_now(some), names))
        results = evaluate_now(samples, metrics=("iou", "calibration") if config.loop.calibration else ("iou",))
        run.log(
            done, {**validation_record(results, names), **({} if iteration == done else {"of_iteration": iteration})}
        )
        if run.accelerator.is_main_process:
            report(run, model, samples, results, iteration, done)
    return results


def _train(run: Run, model: SegmentationModel, evaluate_now: Callable[[], dict[str, float]]) -> tuple[int, int]:
    """Put the model onto its device, start the run, train; gives the updates made, and the iteration of the weights."""
    config, accelerator = run.config, run.accelerator
    machine = config.machine
    channels_last = is_convolutional(model.backbone) if machine.channels_last is None else machine.channels_last
    model.to(accelerator.device)
    if machine.sync_batchnorm:
        share_batch_norms(model, accelerator)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    with options_become_parts():
        if machine.grad_checkpointing:
            start_grad_checkpointing(model.backbone)
        optimizer = config.optimization.create(model)
        config.optimization.rate_at(0, config.loop.iterations)  # refuses what is out of range, as does the next
        training_loader(config, run.training_set, 0)
    start = run.start()
    drawn: Any = {"mean": model.data_config["mean"], "rare": run.rare_classes}
    loader: Any = training_loader(config, run.training_set, start, **drawn)
    _say(run, model, channels_last)
    prepare = normalization(model).to(accelerator.device)
    show_crops(run, loader.dataset, loader.batch_sampler, prepare)
    keeper = Keeper(config.keeping, model, accelerator)
    if machine.compile:
        model.compile()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    keeper.register()
    set_seed(config.seed, device_specific=True)  # each process drops other paths
    if start:
        run.folder.load(accelerator, start)
    explain = partial(explain_failure, accelerator, config, run.training_set, model, rare=run.rare_classes)
    skips = config.optimization.skip_nonfinite
    records = run.folder.records()
    learner = ModelLearner(
        accelerator,
        prepared,
        optimizer,
        schedule=partial(config.optimization.rate_at, iterations=config.loop.iterations),
        max_grad_norm=config.optimization.max_grad_norm,
        clip_mode=config.optimization.clip_mode,
        explain=explain,
        finite=FiniteSteps(accelerator, model, optimizer, tolerated=skips, explain=explain, records=records),
    )
    batches = training_batches(loader, prepare, channels_last=channels_last)

    def evaluate_kept() -> dict[str, float]:
        with keeper.evaluated():
            return evaluate_now()

    def judge(iteration: int, scores: Mapping[str, Any]) -> bool:
        with keeper.evaluated():
            _watch(run, model, iteration)
        return keeper.judge(iteration, scores)

    done = start
    if keeper.has_missed(start, config.loop.evaluate_every):
        keeper.judge(start, evaluate_kept())
    if not keeper.stops:  # else the run has ended before
        kept = keeper.around(learner)
        done = train(run, kept, batches, config.loop, start=start, evaluate=evaluate_kept, judge=judge)
        if config.keeping.best is not None and not keeper.stops:
            keeper.judge(done, evaluate_kept())
    return done, keeper.finish(done)


def _say(run: Run, model: SegmentationModel, channels_last: bool) -> None:
    """What begins, in words."""
    config, optimization = run.config, run.config.optimization
    log.info(
        f"{config.model.head} on {config.model.backbone}: "
        f"{_parameters(model)}{_frozen(config)}; "
        f"{len(run.training_set)} training and {len(run.validation_set)} validation images of {model.num_labels} "
        f"classes; {run.accelerator.num_processes} process(es) on {run.accelerator.device.type}"
        f"{', channels last' if channels_last else ''}, {_precision(run.accelerator)}\n"
        f"{run.batches_line()}; {_loss(config, model)}\n"
        f"{optimization.optimizer}: learning rate {optimization.learning_rate:g} {optimization.schedule} "
        f"(backbone times {optimization.backbone_lr_scale:g}{_decayed(config)}), "
        f"weight decay {optimization.weight_decay:g}, "
        f"gradients clipped at {optimization.max_grad_norm}{_clipped(config)}, "
        f"drop path {config.model.drop_path_rate:g}\n"
        f"{paths_line(run.accelerator, [model], run.images_per_step())}" + crops_words(run)
    )


def _parameters(model: SegmentationModel) -> str:
    """How many there are, and how many learn where not all do."""
    whole, learning = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (True, False)
    )
    return f"{whole:.1f} M parameters" + (f", of which {learning:.1f} M learn" if learning < whole else "")


def _precision(accelerator: Accelerator) -> str:
    """Of the forward pass, and on a GPU what fp32 products are rounded to."""
    name = PRECISIONS[accelerator.mixed_precision]
    rounds = accelerator.device.type == "cuda" and name == "fp32" and torch.backends.cuda.matmul.allow_tf32
    return f"{name}, its products in TF32" if rounds else name


def _loss(config: TrainingConfig, model: SegmentationModel) -> str:
    """The loss and what it is divided by."""
    auxiliary = f", and {model.auxiliary_weight:g} times the auxiliary head's" if model.auxiliary_head else ""
    weights = ", weighted by class" if config.model.class_weights else ""
    return f"loss {config.model.loss}{weights}, divided by the update's {model.criterion.divides_by}{auxiliary}"


def _decayed(config: TrainingConfig) -> str:
    decay = config.optimization.layer_decay
    return "" if decay == 1 else f", and {decay:g} for each layer"


def _clipped(config: TrainingConfig) -> str:
    mode = config.optimization.clip_mode
    return "" if mode == "norm" else f" ({mode})"


def _frozen(config: TrainingConfig) -> str:
    """What does not learn, in words."""
    stages = f", its first {config.model.freeze_stages} stages frozen" if config.model.freeze_stages else ""
    return ", the backbone frozen" if config.model.freeze_backbone else stages


def evaluation_samples(
    run: Run, mean: Sequence[float], std: Sequence[float]
) -> tuple[EvaluationSamples, EvaluationSamples]:
    """The validation images, and those of them on which the run is evaluated on its way.

    Args:
        run: The run.
        mean: The backbone's, per channel.
        std: The backbone's, per channel.
    """
    count, scale = run.config.loop.evaluate_images, run.config.protocol.scale
    some = run.validation_set if count is None else SubsetDataset.spaced(run.validation_set, count)
    return EvaluationSamples(run.validation_set, mean, std, scale), EvaluationSamples(some, mean, std, scale)


def shown(config: TrainingConfig) -> InferenceProtocol:
    """How the model is shown images that are resized into the protocol's scale as they are read.

    Args:
        config: Numbers of the run.
    """
    return dataclasses.replace(config.protocol, scale=None)


def _watch(run: Run, model: SegmentationModel, iteration: int) -> None:
    """Pictures and scores of single classes, in the main process, after an evaluation was logged."""
    if run.accelerator.is_main_process:
        write_class_iou(run.folder.path, run.folder.records(), run.validation_set.class_names)
        samples, _ = evaluation_samples(run, model.data_config["mean"], model.data_config["std"])
        _draw(run, model, samples, iteration)


def _draw(run: Run, model: SegmentationModel, samples: EvaluationSamples, iteration: int) -> list[Row]:
    return draw_predictions(
        run.accelerator,
        model,
        samples,
        shown(run.config),
        count=run.config.pictures,
        folder=run.folder.path,
        iteration=iteration,
    )


def report(
    run: Run,
    model: SegmentationModel,
    samples: EvaluationSamples,
    results: dict[str, Tensor],
    iteration: int,
    done: int | None = None,
) -> None:
    """Write the model, the tables and the pictures of a finished run; to be called by one process.

    Args:
        run: The run.
        model: What was trained.
        samples: What it was evaluated on.
        results: What `evaluate` gave.
        iteration: That the model is of.
        done: Number of updates made, for the trackers; None means the same.
    """
    config, dataset, folder = run.config, samples.dataset, run.folder.path
    model.classes, model.protocol = dataset.classes, config.protocol
    with whole_folder(folder / "model") as temporary:
        keep_card(folder / "model", temporary)
        model.save_pretrained(temporary)
    records = run.folder.records()
    write_class_iou(folder, records, dataset.class_names)
    rows = _draw(run, model, samples, iteration if done is None else done)
    write_report(folder, results, records, dataset, (), iteration=iteration)
    if rows and model.head.is_ensemble:
        with picture_or_warning(folder / "uncertainty.png"):
            indices = picked_samples(samples, config.pictures)
            sizes = [truth.shape for _, _, truth, _ in rows]
            of = partial(predict_uncertainty, run.accelerator, model, protocol=shown(config))
            maps = [of(samples[index][0], size) for index, size in zip(indices, sizes, strict=True)]
            doubts = [(*row, of_row) for row, of_row in zip(rows, maps, strict=True)]
            plot_uncertainty(doubts, dataset, folder / "uncertainty.png")
    write_card_of(folder, folder / "model", model)
    log.info(score_line(results, dataset.class_names))
    log.info("model, tables and pictures are in %s", folder)
