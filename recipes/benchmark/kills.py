"""Kill runs at random moments, and start them in pairs: each must end as if nothing had happened.

    OMP_NUM_THREADS=1 python recipes/benchmark/kills.py
    OMP_NUM_THREADS=1 python recipes/benchmark/kills.py --only checkpoint grid --kills 6 --pairs 0

Small runs on the CPU are forked from this process, which has imported everything, killed with SIGKILL, and resumed
until they end. Right is: the same weights to the last bit, and the same scores, as of the run that nobody disturbed.

- training: a training, killed after a random time; resume: the same, killed again while it goes on
- checkpoint: killed in one of the system calls that make, sync, rename or remove files, whichever
- grid: a sweep of two trainings; cache: probes that fill a cache of features
- predict: `segheads predict` on a folder of images

Pairs are started at the same moment. Of two runs in one folder, or two `segheads predict`, one must do the work and the
other stop with one line. Two
sweeps share the trainings of one folder, and two runs of probes the maps of one cache: both must end right.

Needs a system that forks. Minutes on two cores: about 10.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from segheads import SegmentationModel, create_model
from segheads.ablation import GridConfig, Row, Table, run_grid
from segheads.cli import predict
from segheads.cli.run import run
from segheads.data import Scenes
from segheads.errors import SegheadsError
from segheads.probing import ProbeConfig, run_probing
from segheads.ranges import SEED_LIMIT, Range
from segheads.training import DEMO_RUN, TrainingConfig, run_training

TINY: dict[str, Any] = {
    **DEMO_RUN,
    **{"backbone": "test_vit", "head": "linear", "loss_reduction": "valid", "power": 1.0, "drop_path_rate": 0.2},
    **{"scenes_size": 32, "scale": (32, 32), "crop_size": 32, "batch_size": 2, "threads": 1, "pictures": 0},
    **{"iterations": 8, "checkpoint_every": 1, "keep_checkpoints": 2, "log_every": 1, "evaluate_every": 4},
    **{"warmup_iterations": 0, "tracker": "none", "resume": True},
}
CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")  # of os, that write to the disk
REFUSED = 2  # the exit status after an error of segheads


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is killed, and how often."""

    only: tuple[str, ...] = ()
    """Kinds; none means all."""
    kills: Annotated[int, Range(0)] = 60
    """Shared out over the kinds."""
    pairs: Annotated[int, Range(0)] = 20
    """Of runs; of sweeps, probes and predictions there are a quarter as many each."""
    seed: Annotated[int, Range(0, SEED_LIMIT)] = 0
    """Of the moments."""
    output: Path = Path("runs/kills")
    """Folder; what is in it goes."""


def build(config: Any, num_classes: int) -> SegmentationModel:
    """The model of a configuration."""
    return create_model(config.model.backbone, config.model.head, num_classes, **config.model_options(num_classes))


def train(folder: Path) -> None:
    """A training that keeps an average and its best weights, too."""
    run_training(TrainingConfig.from_flat(**TINY, ema=0.9, best="mIoU", output=folder), build)


def sweep(folder: Path) -> None:
    """A grid of two trainings."""
    rows = [Row(f"rate {rate}", {"learning_rate": rate}) for rate in (1e-3, 3e-3)]
    options = {**TINY, "iterations": 4, "evaluate_every": 0}
    run_grid(GridConfig.from_flat(**options, output=folder), {"rates": Table("Rates", rows)})


def probe(folder: Path) -> None:
    """Two heads on a frozen backbone, whose maps are kept beside the folder."""
    options = {**TINY, "head": "all", "learning_rate": 0.0, "evaluate_every": 0, "drop_path_rate": 0.0}
    heads = {"heads": ("linear", "fcn"), "learning_rates": (1e-3,), "distinct_batches": 4}
    run_probing(ProbeConfig.from_flat(**options, **heads, cache=folder.parent / "cache", output=folder))


def label(folder: Path) -> None:
    """Labels of a folder of images; images and model are made by the first that comes."""
    given = folder.parents[1] / "given"
    if not given.is_dir():
        torch.manual_seed(0)
        create_model("test_vit", "linear", 5, pretrained=False).save_pretrained(given / "model")
        (given / "photos").mkdir()
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(given / "photos" / f"{number}.png")
    options: dict[str, Any] = {
        "results": predict.Results(overlay=True),
        "machine": predict.Machine(device="cpu", threads=1, workers=0),
    }
    predict.main(predict.Config(inputs=(f"{given}/photos",), model=f"{given}/model", output=folder, **options))


KINDS: dict[str, tuple[Callable[[Path], None], int]] = {  # what runs, and how often it is killed
    "training": (train, 1),
    "resume": (train, 2),
    "checkpoint": (train, 1),
    "grid": (sweep, 1),
    "cache": (probe, 1),
    "predict": (label, 1),
}


def main(config: Config) -> None:
    """Run the kills and the pairs; exit with 1 if one did not end right."""
    shutil.rmtree(config.output, ignore_errors=True)
    torch.set_num_threads(1)
    Scenes.__len__ = lambda _: 6  # type: ignore[method-assign]  # evaluations are short
    draw = random.Random(config.seed)
    right = {}
    for number, kind in enumerate(chosen := list(config.only or KINDS)):
        count = config.kills // len(chosen) + (number < config.kills % len(chosen))
        if count:
            right[f"kills, {kind}"] = kill_often(kind, config.output.absolute() / kind, count, draw)
    if config.pairs:
        folder = config.output.absolute() / "pairs"
        right["pairs, training"] = start_pairs(train, folder / "training", config.pairs, exclusive=True)
        right["pairs, grid"] = start_pairs(sweep, folder / "grid", -(-config.pairs // 4))
        right["pairs, cache"] = start_pairs(probe, folder / "cache", -(-config.pairs // 4), own_folders=True)
        right["pairs, predict"] = start_pairs(label, folder / "predict", -(-config.pairs // 4), exclusive=True)
    for name, found in right.items():
        print(f"{name}: {sum(found)} of {len(found)} right")
    every = [one for found in right.values() for one in found]
    print(f"{sum(every)} of {len(every)} right")
    if not all(every):
        raise SystemExit(1)


def kill_often(kind: str, folder: Path, count: int, draw: random.Random) -> list[bool]:
    """Whether each of so many killed runs ended right.

    Args:
        kind: One of `KINDS`.
        folder: For their folders.
        count: How many.
        draw: Of the moments.
    """
    job, kills = KINDS[kind]
    expected, seconds, calls = undisturbed(job, folder / "undisturbed")
    found = []
    for number in range(count):
        own = folder / str(number) / "run"
        for _ in range(kills):
            at = draw.randrange(1, calls + 1) if kind == "checkpoint" else None
            child = fork(job, own, kill_at_call=at)
            if at is None:
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        status = ended(fork(job, own))
        found.append(status == 0 and fingerprint(own) == expected)
        print(f"{kind} {number + 1} of {count}: {'right' if found[-1] else f'WRONG, see {own.parent}'}", flush=True)
        if found[-1]:
            shutil.rmtree(own.parent)
    return found


def start_pairs(
    job: Callable[[Path], None], folder: Path, count: int, *, exclusive: bool = False, own_folders: bool = False
) -> list[bool]:
    """Whether each of so many pairs ended right.

    Args:
        job: What both run.
        folder: For their folders.
        count: How many.
        exclusive: One of them must be refused.
        own_folders: Each has a folder of its own, and they share a cache.
    """
    expected, *_ = undisturbed(job, folder / "undisturbed")
    found = []
    for number in range(count):
        outputs = [folder / str(number) / (name if own_folders else "run") for name in ("run", "other")]
        start = time.time() + 0.2
        children = [fork(job, output, start_at=start, log=f"{k}.log") for k, output in enumerate(outputs)]
        statuses = sorted(map(ended, children))
        is_right = statuses == ([0, REFUSED] if exclusive else [0, 0])
        is_right = is_right and all(fingerprint(output) == expected for output in outputs)
        if exclusive:
            said = [(folder / str(number) / f"{k}.log").read_text(encoding="utf-8") for k in range(2)]
            is_right = is_right and sum(" is in use, a " in text.splitlines()[-1] for text in said) == 1
        found.append(is_right)
        wrong = f"WRONG, {statuses}, see {folder / str(number)}"
        print(f"{folder.name}, pair {number + 1} of {count}: {'right' if is_right else wrong}", flush=True)
        if is_right:
            shutil.rmtree(folder / str(number))
    return found


def undisturbed(job: Callable[[Path], None], folder: Path) -> tuple[dict[str, str], float, int]:
    """What a run leaves, how many seconds it takes, and how often it calls the system to write.

    Args:
        job: The run.
        folder: Where to.
    """
    counted, start = folder / "calls", time.monotonic()
    if ended(fork(job, folder / "run", count_into=counted)) != 0:
        raise SystemExit(f"the undisturbed run failed: {(folder / 'log').read_text(encoding='utf-8')[-2000:]}")
    return fingerprint(folder / "run"), time.monotonic() - start, len(counted.read_bytes())


def fork(
    job: Callable[[Path], None],
    folder: Path,
    *,
    kill_at_call: int | None = None,
    count_into: Path | None = None,
    start_at: float = 0.0,
    log: str = "log",
) -> int:
    """Start a run in a process of its own; gives its number.

    Args:
        job: The run.
        folder: Its folder.
        kill_at_call: It kills itself before this call of the system that writes to the disk.
        count_into: A file that gets a byte for each of these calls.
        start_at: The time at which it begins.
        log: Name of the file beside the folder that gets what it prints.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(folder.parent / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if kill_at_call or count_into:
            watch_calls(kill_at_call or 0, count_into)
        time.sleep(max(0.0, start_at - time.time()))
        job(folder)
        status = 0
    except SegheadsError as error:
        print(error, file=sys.stderr)
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch_calls(kill_at: int, count_into: Path | None) -> None:
    """Count calls of the system that write to the disk, or die before one of them.

    Args:
        kill_at: Number of the call; 0 lets all pass.
        count_into: A file that gets a byte for each.
    """
    made = 0

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def calls(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if count_into is not None:
                with count_into.open("ab") as file:
                    file.write(b".")
            return call(*arguments, **options)

        return calls

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))


def ended(child: int) -> int:
    """The exit status of a process, once it has ended.

    Args:
        child: Its number.
    """
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of all weights and scores that a run, a sweep or a run of probes leaves.

    Args:
        folder: Its folder.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "checkpoints" in name or ".incomplete" in name:
            continue
        if path.suffix == ".safetensors":
            tensors = sorted(load_file(path).items())
            content = b"".join(key.encode() + value.contiguous().numpy().tobytes() for key, value in tensors)
        elif path.name in ("results.json", "measured.json", "heads.json"):
            content = json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True).encode()
        elif path.parent.name == "labels" or path.name == "shares.csv":
            content = path.read_bytes()
        else:
            continue
        found[name] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    run(main, Config, description=__doc__)
