"""Whether loss and label maps take the Triton kernels or the tiles: what a device has, and whether kernels work on it.

Triton builds kernels where they run, with a C compiler, Python's headers, a driver and a cache that it can write. Any
of them may be missing, and a kernel that crashes takes the process along. So each device and type begins with a small
loss and label map in a process of its own; its verdict is remembered.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor

from segheads.errors import OptionError, RunError
from segheads.files import cache_folder, write_json
from segheads.version import VERSION

Setting = Literal["auto", "0", "1"]
LIMIT = 180.0  # seconds that the check may take; building takes about ten, and loading PyTorch up to a minute
UNUSABLE = 3  # the check's exit status where the device serves no second process, and so nothing is known
CHECK = (sys.executable, "-c", "import sys; from segheads.functional.paths import main; main(*sys.argv[1:])")
log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """Whether the kernels work, and if not, why."""

    works: bool
    why: str = ""
    warns: bool = False  # something is broken that should work


def kernels_for(x: Tensor) -> Any:
    """The module of Triton kernels if they can serve logits like x, else None.

    Args:
        x: The logits.

    Raises:
        OptionError: If `SEGHEADS_TRITON` is none of auto, 0 and 1.
        RunError: If it is 1, x is on a GPU, and the kernels do not work there.
    """
    if not _may_serve(x.device):
        return None
    return _kernels() if verdict(x.device, x.dtype).works else None


def path_of_loss(device: torch.device, dtype: torch.dtype) -> str:
    """Which way loss and label map take, in words: `"triton"`, or `"tiles"` with the reason in brackets on a GPU.

    Args:
        device: Where the logits are.
        dtype: Their type.

    Raises:
        OptionError: As `kernels_for` does.
        RunError: As `kernels_for` does.

    Examples:
        >>> path_of_loss(torch.device("cpu"), torch.float64)
        'tiles'
    """
    if not _may_serve(device):
        return "tiles"
    found = verdict(device, dtype)
    return "triton" if found.works else f"tiles ({found.why})"


def triton_setting() -> Setting:
    """The environment variable `SEGHEADS_TRITON`: `"auto"` (the default), `"0"` for tiles, `"1"` for an error instead.

    Raises:
        OptionError: If it is something else.
    """
    value = os.environ.get("SEGHEADS_TRITON", "auto")
    if value not in get_args(Setting):
        raise OptionError(f"SEGHEADS_TRITON must be {', '.join(get_args(Setting))}; got {value!r}")
    return cast(Setting, value)


def verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Whether the kernels serve logits of a type on a device; the first call builds and tries them.

    Args:
        device: Where the logits are.
        dtype: Their type.

    Raises:
        OptionError: As `kernels_for` does.
        RunError: As `kernels_for` does.
    """
    setting = triton_setting()
    if setting == "0":
        return Verdict(False, "SEGHEADS_TRITON=0")
    found = _verdict(device, dtype)
    if setting == "1" and not found.works:
        raise RunError(
            f"SEGHEADS_TRITON=1 asks for Triton's kernels, which do not serve {_named(dtype)} on {device}: {found.why}"
        )
    return found


@cache
def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None


def main(device: str, dtype: str) -> None:
    """What the process of the check does; an error, or any end but a good one, says that the kernels do not work.

    Args:
        device: Where to try them.
        dtype: Type of the logits, without `torch.`.

    Raises:
        SystemExit: With `UNUSABLE` if the device cannot be used in a second process.
    """
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(UNUSABLE) from None
    check(torch.device(device), getattr(torch, dtype))


@torch.inference_mode(False)
def check(device: torch.device, dtype: torch.dtype) -> None:
    """Compare a small loss, its gradient and a label map with plain PyTorch's in float64 on the CPU.

    Args:
        device: Where the kernels run.
        dtype: Type of the logits.

    Raises:
        RuntimeError: If they differ.
        Exception: Whatever Triton raises where it cannot build.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 3, 4, generator=generator)).to(dtype)
    labels = torch.randint(5, (2, 11, 14), generator=generator)
    labels[:, :2] = 255
    with torch.enable_grad():
        exact = logits.double().requires_grad_()
        scores = F.interpolate(exact, size=labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(scores, labels, ignore_index=255, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, exact)
    there, kernels = logits.to(device), _kernels()
    total, found = kernels.loss_and_gradient(there, labels.to(device), None, None, 255, needs_gradient=True)
    best, probability = kernels.label_map(there, (11, 14), torch.int64, return_probability=True)
    expected = {"loss": loss.detach(), "gradient": gradient, "probability": scores.detach().softmax(1).amax(1)}
    for (name, value), ours in zip(expected.items(), (total, found, probability), strict=True):
        assert ours is not None
        if not torch.allclose(ours.cpu().double(), value, rtol=1e-4, atol=1e-4):
            raise RuntimeError(
                f"the kernels' {name} differs from PyTorch's by {float((ours.cpu().double() - value).abs().max()):.3g}"
            )
    chosen = scores.detach().gather(1, best.cpu()[:, None])
    if (scores.detach().amax(1, keepdim=True) - chosen).max() > 1e-4:
        raise RuntimeError("the kernels' label map differs from PyTorch's")


def _may_serve(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    from segheads.functional import upsample_triton  # imports Triton, which only a GPU needs

    return upsample_triton


@cache
def _verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    found = _look(device, dtype)
    if found.warns:
        log.warning(
            "%s on %s: loss and label map take the slower tiles, because the Triton kernels fail: %s",
            _named(dtype),
            device,
            found.why,
        )
    return found


def _look(device: torch.device, dtype: torch.dtype) -> Verdict:
    kernels = _kernels()
    if why := kernels.obstacle(device, dtype):
        return Verdict(False, why)
    if kernels.is_interpreted():
        return Verdict(True)
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), None)
    if compiler is None:
        return Verdict(False, "Triton needs a C compiler, and there is no gcc, no clang and no CC", True)
    about = _about(device, dtype, compiler)
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder("triton") / f"{mark}.json"
    with _alone(path):  # one process of a run looks, the others read what it found
        if (known := _read(path)) is not None:
            return known
        found, is_sure = _try(device, dtype)
        if not is_sure:
            return found
        try:
            write_json(path, {"works": found.works, "why": found.why, **about})
        except OSError as error:
            log.info("that Triton's kernels were checked is not remembered: %s", error)
            return found
    return _with_file(found, path)


def _about(device: torch.device, dtype: torch.dtype, compiler: str) -> dict[str, Any]:
    """What a verdict holds for."""
    return {
        "dtype": _named(dtype),
        "capability": list(torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "triton": _kernels().version(),
        "driver": driver_version(),
        "segheads": VERSION,
        "compiler": compiler,
        "headers": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    }


def _try(device: torch.device, dtype: torch.dtype) -> tuple[Verdict, bool]:
    """The verdict of a check, and whether another one would say the same."""
    log.info("trying the Triton kernels for %s on %s, once", _named(dtype), device)
    try:
        run = subprocess.run([*CHECK, str(device), _named(dtype)], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"their check took more than {LIMIT:g} seconds", True), False
    except OSError as error:
        return _try_here(device, dtype, str(error))
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["no message"]
    if run.returncode == 0:
        return Verdict(True), True
    if run.returncode == UNUSABLE:  # an exclusive GPU, or a full one
        return _try_here(device, dtype, lines[-1])
    if run.returncode < 0:
        return Verdict(False, f"their check died of {_signal(-run.returncode)}", True), True
    return Verdict(False, _shortened(lines[-1]), True), True


def _try_here(device: torch.device, dtype: torch.dtype, why: str) -> tuple[Verdict, bool]:
    """The same in this process, where another one is not to be had."""
    log.info("the Triton kernels are tried in this process, because another one cannot: %s", why)
    try:
        check(device, dtype)
    except Exception as error:  # Triton's, a compiler's or the driver's: there is no common kind
        return Verdict(False, _shortened(f"{type(error).__name__}: {error}"), True), False
    return Verdict(True), True


def _read(path: Path) -> Verdict | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = Verdict(bool(known["works"]), str(known["why"]), not known["works"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or damaged: it is written anew
        return None
    return _with_file(found, path)


def _with_file(found: Verdict, path: Path) -> Verdict:
    return found if found.works else found._replace(why=f"{found.why} (delete {path} to try again)")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file's lock, where one can be had."""
    lock = FileLock(f"{path}.lock", timeout=2 * LIMIT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, Timeout):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _shortened(words: str, most: int = 300) -> str:
    words = " ".join(words.split())
    return words if len(words) <= most else f"{words[:most]} ..."


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
