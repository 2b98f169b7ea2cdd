"""The machine that a run has: processes, threads, precision, memory format."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import psutil
import timm
import timm.layers
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, broadcast_object_list
from torch import nn

from segheads.errors import OptionError, SegheadsError
from segheads.functional.paths import driver_version, path_of_loss
from segheads.mean_shift import MeanShift
from segheads.ranges import Range
from segheads.version import VERSION

log = logging.getLogger(__name__)
R = TypeVar("R")
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """How a run uses the machine that it is on."""

    mixed_precision: Precision | None = None
    """Precision of the forward pass; None means the launcher's (`accelerate launch --mixed_precision`), or fp32. With
    fp16, SGD waits for the device in each step; with bf16 nothing does."""
    channels_last: bool | None = None
    """Keep maps in the memory format that convolutions like; None does so where the backbone is made of them."""
    compile: bool = False
    """torch.compile the training step."""
    grad_checkpointing: bool = False
    """Compute activations inside the backbone's blocks twice instead of keeping them: less memory, longer steps."""
    sync_batchnorm: bool = False
    """Batch norms see the batch of all processes, on GPUs; accumulated parts they see one by one."""
    tf32: bool | None = None
    """Let fp32 products and convolutions of a GPU round to TF32, ten bits; None leaves PyTorch's own choice, which is
    convolutions alone."""
    cudnn_benchmark: bool = False
    """Let cuDNN try its convolutions for each new size and keep the quickest; runs then differ in the last bits."""
    threads: Annotated[int | None, Range(1)] = None
    """CPU threads of each training process; None shares all cores out (accelerate launch alone would give 1)."""
    workers: Annotated[int, Range(0)] = 4
    """Processes that load images, for each process that trains."""


def launched_precision() -> Precision:
    """The precision that `accelerate launch` was told, or its configuration says; `"no"` without either.

    Raises:
        OptionError: If it is none that segheads trains in, such as fp8.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in get_args(Precision):
        raise OptionError(
            f"accelerate was launched with mixed_precision {asked}; known are {', '.join(get_args(Precision))}"
        )
    return cast(Precision, asked)


def check_launcher(gradient_accumulation: int) -> None:
    """Refuse what the launcher was told and segheads has an option of its own for.

    Args:
        gradient_accumulation: What the run does.

    Raises:
        OptionError: If the launcher's gradient accumulation is another.
    """
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked not in ("1", str(gradient_accumulation)):
        raise OptionError(
            f"accelerate was launched with gradient_accumulation_steps {asked}, which is not used; give the recipe "
            f"gradient_accumulation {asked}"
        )


def start_accelerator(machine: MachineConfig, *, tracker: str = "none", folder: Path | None = None) -> Accelerator:
    """Set up what connects processes and devices, and share the CPU's cores out.

    Args:
        machine: Precision and threads.
        tracker: A tracker of Accelerate, or `"none"`.
        folder: Where the tracker writes.

    Raises:
        OptionError: Accelerate has no such tracker, or its package is not installed; without TensorBoard's, which is
            the default, a warning says that nothing is tracked.
    """
    _check_tracker(tracker)
    accelerator = Accelerator(
        mixed_precision=machine.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the launcher's would divide once more
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )
    share_cores(accelerator, machine.threads)
    choose_arithmetic(machine)
    return accelerator


def _check_tracker(tracker: str) -> None:
    """Refuse what Accelerate would leave out in silence."""
    there = [str(kind) for kind in get_available_trackers()]
    if tracker in ("none", "all", *there):
        return
    known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
    if tracker not in known:
        raise OptionError(f"no tracker is called {tracker!r}; Accelerate knows {', '.join(known)}, or none")
    if tracker != "tensorboard":
        raise OptionError(f"tracker {tracker!r} needs its package, which is not installed; install it, or give none")
    log.warning("tensorboard is not installed, so it tracks nothing; pip install tensorboard, or give tracker none")


def from_main(accelerator: Accelerator, function: Callable[[], R]) -> R:
    """What a function gives in the main process, or the error that it raises there, in all of them.

    Args:
        accelerator: What connects the processes; all of them call this.
        function: Without arguments; its value can be pickled.

    Raises:
        SegheadsError: That of the function.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [function()]
        except SegheadsError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], SegheadsError):
        raise found[0]
    value: R = found[0]
    return value


def choose_arithmetic(machine: MachineConfig) -> None:
    """Set what `tf32` and `cudnn_benchmark` say, for the whole process.

    Args:
        machine: Says it.
    """
    if machine.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = machine.tf32
    torch.backends.cudnn.benchmark = machine.cudnn_benchmark


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a run's numbers and times depend on beside its options; None where there is no such thing.

    Args:
        device: The run's.
        processes: That train.
    """
    on_gpu = device.type == "cuda"
    cudnn = torch.backends.cudnn
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "triton": installed_version("triton") if on_gpu else None,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32 if on_gpu else None,
        "tf32_convolutions": cudnn.allow_tf32 if on_gpu else None,
        "cudnn_benchmark": cudnn.benchmark if on_gpu else None,
        "cudnn_deterministic": cudnn.deterministic if on_gpu else None,
        "processes": processes,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "segheads": VERSION,
    }


def command_line(words: Sequence[str]) -> list[str] | None:
    """The words that started a training, or None where no command of segheads and no recipe did.

    Args:
        words: `sys.argv`.

    Examples:
        >>> command_line(["/usr/bin/segheads", "train", "--demo"])
        ['segheads', 'train', '--demo']
    """
    program = Path(words[0])
    if "segheads" in (program.stem, program.parent.name):
        return ["segheads", *words[1:]]
    return ["python", f"recipes/{program.name}", *words[1:]] if program.parent.name == "recipes" else None


def memory_in_use(device: torch.device) -> float:
    """GB (1e9 bytes): of a GPU the most that tensors took since the process began, elsewhere what the process holds.

    Args:
        device: The run's.
    """
    used: int = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 1e9


def installed_version(package: str) -> str | None:
    """The version of a package, without importing it; None where it is not installed.

    Args:
        package: Its name in a package index.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def paths_line(accelerator: Accelerator, models: Sequence[nn.Module], batch_size: int) -> str:
    """Which way loss, label map and mean shift take on the run's device, in its precision.

    Args:
        accelerator: Tells both.
        models: What is trained.
        batch_size: Images of one process in one batch.

    Raises:
        OptionError: If `SEGHEADS_TRITON` is none of auto, 0 and 1.
        RunError: If it is 1, and the kernels do not work.

    Examples:
        >>> paths_line(Accelerator(cpu=True), [nn.Linear(2, 2)], 8)
        'paths: loss tiles, label map tiles'
    """
    device = accelerator.device
    with accelerator.autocast():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        shifts = []
        for block in (m for model in models for m in model.modules() if isinstance(m, MeanShift) and m.num_layers):
            channels, here = block.projection.in_features, block.projection.weight.device
            shifts.append(block.path(torch.zeros(batch_size, channels, 2, 2, device=here, requires_grad=True)))
    path = path_of_loss(device, dtype)
    said = {"loss": path, "label map": path, "mean shift": " and ".join(sorted(set(shifts)))}
    return "paths: " + ", ".join(f"{name} {way}" for name, way in said.items() if way)


def share_cores(accelerator: Accelerator, threads: int | None) -> None:
    """Give each process on a CPU its threads.

    Args:
        accelerator: Tells the device and how many processes there are.
        threads: How many; None shares all cores out.
    """
    if accelerator.device.type == "cpu":
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))


def share_batch_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let batch norms see the batch of all processes; torch has that on GPUs only, and elsewhere a warning says so.

    Args:
        model: Its batch norms are exchanged, in place.
        accelerator: Tells device and processes; with one process nothing happens.
    """
    if accelerator.num_processes == 1 or not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    ):
        return model
    if accelerator.device.type != "cuda":
        log.warning(
            "sync_batchnorm: torch has it on GPUs only; here the batch norms of each of %d processes see its own batch",
            accelerator.num_processes,
        )
        return model
    shared: nn.Module = timm.layers.convert_sync_batchnorm(model)
    return shared


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether a quarter of the layers or more are convolutions: ConvNeXt has 2 of 5, a ViT or Swin its patches' one."""
    layers = [layer for layer in backbone.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return 4 * sum(isinstance(layer, nn.Conv2d) for layer in layers) >= max(len(layers), 1)
