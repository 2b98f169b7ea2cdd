"""What every recipe can be told: parts with fields of their own, which are one flat list of options and JSON keys."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from typing_extensions import Self, is_typeddict

from segheads.classes import ignored_label
from segheads.data.augmentation import AugmentationConfig
from segheads.data.config import DataConfig
from segheads.errors import OptionError
from segheads.functional.upsample import Reduction
from segheads.inference.protocol import InferenceProtocol, Size
from segheads.ranges import SEED_LIMIT, Range, check_ranges
from segheads.training.keeping import KeepingConfig
from segheads.training.machine import MachineConfig, check_launcher, launched_precision
from segheads.training.optimization import OptimizationConfig

C = TypeVar("C")

# A resumed run may change where things are, how often it reports, and in what order the machine sums up (threads,
# channels_last, compile: rounding, and which random numbers drop a path), but nothing else that its weights depend on.
# In config.json: what is no option; `segheads.training.resuming` says what may be another where a run goes on
ENVIRONMENT, CONTENTS = "environment", "contents"
MAY_DIFFER = {
    *("output", "resume", "extend", "data_root", "download", "scan", "backbone_weights", "pretrained"),
    *("workers", "threads", "channels_last", "compile", "tf32", "cudnn_benchmark", ENVIRONMENT, CONTENTS),
    *("tracker", "pictures", "calibration", "skip_nonfinite"),
    *("evaluate_every", "evaluate_images", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("window", "stride", "scales", "flip", "small_images", "threshold"),
}

# What decides which model is the best: where there is one, a resumed run may not change it
JUDGES = {"evaluate_every", "evaluate_images", "window", "stride", "scales", "flip", "small_images", "threshold"}

# What options that came later stand for in an older config.json, where that is not their default
OLDER: dict[str, Any] = {"auxiliary_reduction": "valid"}

# What the recipes' demos share: AdamW on 96 x 96 scenes that the code draws
DEMO_RUN: dict[str, Any] = {
    "demo": True,
    "pretrained": False,
    "dataset": "scenes",
    "scenes_size": 96,
    "scale": (96, 96),
    "crop_size": 96,
    "drop_path_rate": 0.0,
    "iterations": 300,
    "batch_size": 16,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "min_learning_rate": 0.0,
    "warmup_iterations": 50,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "workers": 0,
    "window": None,
    "stride": None,
    "evaluate_every": 0,
    "checkpoint_every": 100,
    "log_every": 10,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone, the head and the loss; a recipe has the options of its head."""

    backbone: str
    """Any timm architecture."""
    pretrained: bool = True
    """Fetch timm's weights of the backbone; --no-pretrained starts from random ones."""
    backbone_weights: Path | None = None
    """A local checkpoint of the backbone, instead of the hub's."""
    init_from: str | None = None
    """A run, a saved model's folder or its name on the hub, whose weights the run starts from; for other classes than
    the data set's the classifier is new."""
    patch_size: Annotated[int | None, Range(1)] = None
    """Side of a ViT's patches, pixels; None leaves the architecture's."""
    depth: Annotated[int | None, Range(1)] = None
    """Number of a ViT's blocks; None leaves the architecture's."""
    head: str
    """Any of segheads.list_heads()."""
    drop_path_rate: Annotated[float, Range(0, 1, below=True)]
    """Stochastic depth of the backbone."""
    freeze_backbone: bool = False
    """The backbone learns nothing: its weights and statistics stay, and nothing in it is dropped."""
    freeze_stages: Annotated[int, Range(0)] = 0
    """The same of its stem and so many first stages (blocks of a plain ViT); 0 freezes none."""
    loss: str = "ce"
    """Any of segheads.losses.LOSSES, or a sum: ce (cross-entropy), "ce + 0.5*dice", "focal(gamma=3) + ohem"; bce, or
    "bce + dice", is of one class against its background, labels 1 and 0, with one logit for each pixel."""
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of the target that the loss spreads over all classes."""
    class_weights: Annotated[str | tuple[float, ...] | None, Range(0)] = None
    """Weights of the classes in the loss: balanced, effective (segheads.data.class_weights), the path of a JSON file,
    or the numbers themselves."""
    loss_reduction: Reduction
    """Divide the loss by all pixels, or by the valid ones, of the whole update."""

    def loss_options(self) -> dict[str, Any]:
        """What the loss is told beside its name and reduction.

        Raises:
            OptionError: `class_weights` has a rule or a path, for which `Run.model_config` puts numbers.
        """
        weights = self.class_weights
        if isinstance(weights, str):
            raise OptionError(f"class_weights {weights!r} must become numbers first; Run.model_config has them")
        options = {"weight": list(weights) if weights else None, "label_smoothing": self.label_smoothing or None}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run is, and what it does on the way: evaluate, keep checkpoints, log."""

    iterations: Annotated[int, Range(1)] = 160_000
    """Updates of the weights."""
    batch_size: Annotated[int, Range(1)]
    """Images of one update, over all processes and accumulated batches."""
    gradient_accumulation: Annotated[int, Range(1)] = 1
    """Batches into which each update is cut."""
    evaluate_every: Annotated[int, Range(0)] = 16_000
    """Iterations between evaluations; 0 evaluates at the end alone."""
    evaluate_images: Annotated[int | None, Range(1)] = None
    """Evaluate on so many images, at equal distances in the set, during training; the last evaluation is on all."""
    calibration: bool = False
    """Also measure the expected calibration error of the final evaluation."""
    checkpoint_every: Annotated[int, Range(0)] = 1000
    """Iterations between checkpoints."""
    keep_checkpoints: Annotated[int, Range(1)] = 3
    """How many checkpoints to keep, the last ones."""
    log_every: Annotated[int, Range(0)] = 50
    """Iterations between records in the log."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The numbers of a run that recipes share.

    A recipe's `Config` inherits it, adds the options of its model, and gives the parts the values of its protocol. tyro
    shows the description below where a recipe writes none of its own. Flags and config.json have the fields of all
    parts side by side: no name may stand twice. See `flat`, `changed` and `from_flat`.
    """

    demo: bool = False
    """Train a small model from random weights on drawn scenes, in one to two minutes on two CPU cores."""
    output: Path
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in `output`."""
    extend: Annotated[int | None, Range(1)] = None
    """Go on with the finished run in `output` to so many iterations in all; from there on the learning rate is that of
    a run of this length."""
    seed: Annotated[int, Range(0, SEED_LIMIT)] = 0
    """Of the initial weights, the samples and their distortions, and what is dropped."""
    crop_size: Annotated[Size, Range(1)] = 512
    """Side of the training crops, pixels, or their height and width (Cityscapes: 512 1024)."""
    training_flip: bool = True
    """Mirror half of the training crops; --flip is that of evaluations."""
    tracker: str = "tensorboard"
    """A tracker of Accelerate, or none."""
    pictures: Annotated[int, Range(0)] = 6
    """Rows of the picture sheet; 0 draws none, nor augment.png."""
    model: ModelConfig
    """Backbone, head and loss."""
    data: DataConfig = DataConfig()
    """The data set."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """What happens to training crops beyond the published pipeline."""
    scan: bool = True
    """Look at all labels of both splits before the first step; what was read is remembered."""
    optimization: OptimizationConfig
    """Optimizer and learning rate."""
    loop: LoopConfig
    """Length, evaluations, checkpoints, log."""
    keeping: KeepingConfig = KeepingConfig()
    """Best model, average of weights, early end."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512))
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""
    machine: MachineConfig = MachineConfig()
    """Precision, memory format, processes."""

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """Build a configuration from fields of all its parts, side by side, as config.json and flags have them.

        Args:
            **values: Fields by name; one that is missing has the class' default.

        Raises:
            TypeError: If a field is unknown, or one without a default is missing.
        """
        given, hints = dict(values), get_type_hints(cls)
        own: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in given:
                own[field.name] = given.pop(field.name)
            elif _is_part(hints[field.name]):
                names = _names(hints[field.name])
                inner = {name: given.pop(name) for name in names if name in given}
                if field.default is not dataclasses.MISSING:
                    own[field.name] = dataclasses.replace(field.default, **inner)
                elif field.default_factory is not dataclasses.MISSING:
                    own[field.name] = {**field.default_factory(), **inner}
                else:
                    own[field.name] = hints[field.name](**inner)
        if given:
            raise TypeError(f"{cls.__name__} has no field {', '.join(given)}")
        return cls(**own)

    def as_json(self) -> dict[str, Any]:
        """The configuration in JSON values, as config.json has it: flat."""
        return {key: _json_value(value) for key, value in flat(self).items()}

    def model_options(self, num_classes: int | None = None) -> dict[str, Any]:
        """The arguments of `create_model` that the fields above stand for, but for the names of backbone and head.

        Args:
            num_classes: Of the data set, whose label of "no class" is told then, too.
        """
        ignored = {} if num_classes is None else {"ignore_index": ignored_label(num_classes)}
        channels = self.data.image_form.channels
        frozen = {"freeze_backbone": self.model.freeze_backbone, "freeze_stages": self.model.freeze_stages}
        sizes = {"patch_size": self.model.patch_size, "depth": self.model.depth}
        return {
            "pretrained": not self.model.init_from and (self.model.backbone_weights or self.model.pretrained),
            "backbone_kwargs": {
                "img_size": self.crop_size,
                "drop_path_rate": self.model.drop_path_rate,
                "model_kwargs": {key: value for key, value in sizes.items() if value is not None},
                **({} if channels == 3 else {"in_chans": channels}),
            },
            **{name: value for name, value in frozen.items() if value},
            "loss": self.model.loss,
            "loss_kwargs": self.model.loss_options(),
            "loss_reduction": self.model.loss_reduction,
            **ignored,
        }


T = TypeVar("T", bound=TrainingConfig)


def flat(config: Any) -> dict[str, Any]:
    """All fields of a configuration and of its parts, by name.

    Args:
        config: A dataclass; fields that are dataclasses or of a `TypedDict` are its parts.

    Examples:
        >>> machine = MachineConfig(workers=2)
        >>> flat(machine)["workers"]
        2
    """
    hints, values = get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values.update(flat(value))
        elif is_typeddict(hints[field.name]):
            values.update(value)
        else:
            values[field.name] = value
    return values


def changed(config: C, **values: Any) -> C:
    """The configuration with other values of its fields, or of fields of its parts.

    Args:
        config: A dataclass.
        **values: New values by name, as `flat` has them.

    Raises:
        TypeError: If neither the configuration nor a part has such a field.

    Examples:
        >>> changed(DataConfig(), dataset="camvid").dataset
        'camvid'
    """
    given, own = dict(values), {}
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass, which C cannot say
        if field.name in given:
            own[field.name] = given.pop(field.name)
        elif _is_part(hints[field.name]):
            part = getattr(config, field.name)
            inner = {name: given.pop(name) for name in _names(part) if name in given}
            if inner:
                own[field.name] = {**part, **inner} if isinstance(part, dict) else changed(part, **inner)
    if given:
        raise TypeError(f"{type(config).__name__} has no field {', '.join(given)}")
    return dataclasses.replace(config, **own)  # type: ignore[type-var]  # C is a dataclass


def as_launched(config: T) -> T:
    """The configuration with what `accelerate launch` was told where the options say nothing.

    Args:
        config: Numbers of a run.

    Raises:
        OptionError: If a number is out of range, or the launcher was told what segheads cannot do, or does by an option
            of its own.
    """
    check_ranges(config)
    check_launcher(config.loop.gradient_accumulation)
    return changed(config, mixed_precision=config.machine.mixed_precision or launched_precision())


def field_defaults(config: Any) -> dict[str, Any]:
    """The default of every field that has one, flat and in JSON values: what an older config.json stands for.

    Args:
        config: A dataclass.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= field_defaults(value)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            values |= default if isinstance(default, Mapping) and field.name not in flat(config) else {}
        elif field.default is not dataclasses.MISSING:
            values[field.name] = _json_value(field.default)
    return values


def _is_part(hint: Any) -> bool:
    return is_typeddict(hint) or dataclasses.is_dataclass(hint)


def _names(part: Any) -> list[str]:
    """Names of the fields of a part, or of a class of parts."""
    if dataclasses.is_dataclass(part):
        return [field.name for field in dataclasses.fields(part)]
    return list(get_type_hints(part)) if isinstance(part, type) else list(part)


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
