"""What every recipe can be told: one frozen dataclass, from which tyro makes the command line."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from segheads.data.config import DataConfig
from segheads.functional.upsample import Reduction

# A resumed run may change where things are, how often it reports, and in what order the machine sums up (threads,
# channels_last, compile: rounding, and which random numbers drop a path), but nothing else that its weights depend on.
MAY_DIFFER = {
    *("output", "resume", "data_root", "download", "backbone_weights", "pretrained"),
    *("workers", "threads", "channels_last", "compile", "tracker", "pictures", "calibration"),
    *("evaluate_every", "evaluate_images", "checkpoint_every", "keep_checkpoints", "log_every", "window", "stride"),
}

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
class TrainingConfig:
    """The numbers of a run that recipes share.

    A recipe's `Config` inherits it, adds the options of its model, and gives the fields that have no default here the
    values of its protocol. tyro shows the description below where a recipe writes none of its own.
    """

    demo: bool = False
    """Train a small model from random weights on drawn scenes, in one to two minutes on two CPU cores."""
    output: Path
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in `output`."""

    # The model
    backbone: str
    """Any timm architecture."""
    pretrained: bool = True
    """Fetch timm's weights of the backbone; --no-pretrained starts from random ones."""
    backbone_weights: Path | None = None
    """A local checkpoint of the backbone, instead of the hub's."""
    patch_size: int | None = None
    """Side of a ViT's patches, pixels; None leaves the architecture's."""
    depth: int | None = None
    """Number of a ViT's blocks; None leaves the architecture's."""
    head: str
    """Any of segheads.list_heads()."""
    drop_path_rate: float
    """Stochastic depth of the backbone."""
    loss: str = "ce"
    """Any of segheads.losses.LOSSES: ce is cross-entropy."""
    label_smoothing: float = 0.0
    """Share of the target that the loss spreads over all classes."""
    loss_reduction: Reduction
    """Divide the loss by all pixels, or by the valid ones."""

    # The data
    dataset: str = "ade20k"
    """Any of segheads.data.DATASETS: a published data set, scenes drawn by the code, or a folder of your own."""
    data_root: Path | None = None
    """Where the data set lies; None means its usual place below data/, such as data/ADEChallengeData2016. Your own
    holds images/train, labels/train, images/val and labels/val."""
    class_names: tuple[str, ...] | None = None
    """The classes of your own folder, in the order of the values in its label files."""
    num_classes: int | None = None
    """How many classes your own folder has, in place of their names; or 59 for pascal_context without background."""
    ignore_index: int | None = None
    """The value in your own label files that means no class; None means 255, and 0 that the first class is 1."""
    download: bool = False
    """Fetch the data set into the data root if it is not there; ADE20K can be fetched."""
    train_images: int | None = None
    """Train on so many images of the data set, drawn by the seed; None takes all."""
    scale: tuple[int, int] = (2048, 512)
    """Longest and shortest side, pixels: images are resized into it for evaluation, and about it for training."""
    crop_size: int = 512
    """Side of the training crops, pixels."""
    scenes_size: int = 128
    """Side of the drawn scenes, pixels."""

    # The optimisation
    iterations: int = 160_000
    """Updates of the weights."""
    batch_size: int
    """Images of one update, over all processes and accumulated batches."""
    gradient_accumulation: int = 1
    """Batches into which each update is cut."""
    optimizer: str
    """In timm's words: sgd (which is Nesterov), momentum (which is not), adamw, and the rest."""
    learning_rate: float
    """The rate at the start of the decay."""
    min_learning_rate: float
    """The rate at the end of the decay."""
    power: float
    """Exponent of the decay."""
    warmup_iterations: int = 0
    """Updates over which the rate rises linearly, from 1e-6 of what the decay gives."""
    momentum: float = 0.9
    """Momentum, for sgd and momentum."""
    weight_decay: float
    """Decay of all weights but norms, biases, position tables, tokens and class embeddings."""
    max_grad_norm: float | None = None
    """Clip the norm of the gradient; None does not."""
    seed: int = 0
    """Of the initial weights, the samples and their distortions, and what is dropped."""

    # The machine
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass. With fp16, SGD waits for the device in each step; with bf16 nothing does."""
    channels_last: bool | None = None
    """Keep maps in the memory format that convolutions like; None does so where the backbone is made of them."""
    compile: bool = False
    """torch.compile the training step."""
    threads: int | None = None
    """CPU threads of each training process; None shares all cores out (accelerate launch alone would give 1)."""
    workers: int = 4
    """Processes that load images, for each process that trains."""

    # The evaluation and the log
    window: int | None
    """Side of the sliding window, pixels; None shows whole images."""
    stride: int | None
    """Pixels between windows."""
    evaluate_every: int = 16_000
    """Iterations between evaluations; 0 evaluates at the end alone."""
    evaluate_images: int | None = None
    """Evaluate on the first so many images during training; the last evaluation is always on all."""
    calibration: bool = False
    """Also measure the expected calibration error of the final evaluation."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep, the last ones."""
    log_every: int = 50
    """Iterations between records in the log."""
    tracker: str = "tensorboard"
    """A tracker of Accelerate, or none."""
    pictures: int = 6
    """Rows of the picture sheet."""

    def as_json(self) -> dict[str, Any]:
        """The configuration in JSON values, as config.json has it."""
        return {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(self).items()}

    def defaults_as_json(self) -> dict[str, Any]:
        """What fields count as that the config.json of an older version lacks."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            key: str(v) if isinstance(v, Path) else v for key, v in defaults.items() if v is not dataclasses.MISSING
        }

    def data_config(self) -> DataConfig:
        """The data set and its options, as `open_dataset` takes them."""
        return DataConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataConfig)})

    def model_options(self) -> dict[str, Any]:
        """The arguments of `create_model` that the fields above stand for, but for the names of backbone and head."""
        sizes = {"patch_size": self.patch_size, "depth": self.depth}
        return {
            "pretrained": self.backbone_weights or self.pretrained,
            "backbone_kwargs": {
                "img_size": self.crop_size,
                "drop_path_rate": self.drop_path_rate,
                "model_kwargs": {key: value for key, value in sizes.items() if value is not None},
            },
            "loss": self.loss,
            "loss_kwargs": {"label_smoothing": self.label_smoothing} if self.label_smoothing else {},
            "loss_reduction": self.loss_reduction,
        }
