"""Label images: files, folders at any depth and patterns, with a trained model.

    segheads predict photos --model runs/own --output labels
    segheads predict "photos/**/*.jpg" more/a.png --model runs/own --output labels --overlay
    accelerate launch -m segheads predict photos --model OWNER/NAME --output labels --probability --uncertainty

Writes labels/NAME.png into `--output`: class indices, shown in the classes' colours. NAME is the image's path below the
folder that holds all, without the ending. `--overlay` adds overlay/NAME.jpg; `--probability` probability/NAME.npy,
float16, (classes, height, width); `--uncertainty` uncertainty/NAME.png, the entropy of each pixel, white the highest.
shares.csv has the share of every class in every image.

What is done is not done again, unless the image, the model or its protocol is another: record.jsonl knows. The exit
status is 0, or 1 if images failed, which are named and stop no other, or 2 if nothing could begin.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from segheads.data.limits import pixel_limit
from segheads.errors import OptionError, options_become_parts
from segheads.files import readable
from segheads.inference.protocol import InferenceProtocol, Size, SmallImages
from segheads.labelling import Kinds, Record, Source, find_images, key_of, label_files, name_results
from segheads.locks import only_process
from segheads.predictor import Predictor
from segheads.ranges import Range, check_ranges
from segheads.training.machine import Precision, from_main, launched_precision, share_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is written of each image beside its labels."""

    overlay: bool = False
    """The image under the colours of its classes."""
    opacity: Annotated[float, Range(0, 1)] = 0.5
    """Of the overlay's colours: 0 shows the image alone, 1 the colours alone."""
    probability: bool = False
    """The probability of every class."""
    uncertainty: bool = False
    """How unsure the model is of each pixel, as a grey picture."""
    redo: bool = False
    """Label what is done, too."""
    json: bool = False
    """Print what was done as JSON, for programs, in place of words."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """How the model is shown images; None means as its own protocol says."""

    scale: Annotated[tuple[int, int] | None, Range(1)] = None
    """Longest and shortest side, pixels, into which images are resized."""
    whole: bool = False
    """Whole images, where the protocol has windows."""
    window: Annotated[Size | None, Range(1)] = None
    """Side of the windows, pixels, or their height and width."""
    stride: Annotated[Size | None, Range(1)] = None
    """Pixels between windows; None means the protocol's, or that of another window."""
    scales: Annotated[tuple[float, ...] | None, Range(0, above=True)] = None
    """Factors of the image's size whose probabilities are averaged."""
    flip: bool = False
    """Average with the mirrored image, too, whether the protocol does or not."""
    small_images: SmallImages | None = None
    """Make the window smaller for an image below its size, or enlarge the image."""
    threshold: Annotated[float | None, Range(0, 1, above=True, below=True)] = None
    """Of a model of one class: the probability above which a pixel is of it."""

    def of(self, own: InferenceProtocol) -> InferenceProtocol:
        """The model's protocol with what was given."""
        if self.whole and (self.window or self.stride):
            raise OptionError("--whole shows no windows, and --window and --stride do; leave one out")
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        given.pop("whole", None)
        if self.whole or "window" in given:
            given = {"window": None, "stride": None, **given}
        with options_become_parts():
            return dataclasses.replace(own, **given)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the machine is used."""

    device: str | None = None
    """Where the model runs, such as cpu or cuda:1; None takes a GPU where there is one."""
    mixed_precision: Precision | None = None
    """Precision of the forward pass; None means the launcher's, or fp32."""
    batch_size: Annotated[int, Range(1)] = 8
    """Windows, or images of one size, in one call of the model."""
    workers: Annotated[int, Range(0)] = 2
    """Threads of each process that read images ahead."""
    threads: Annotated[int | None, Range(1)] = None
    """CPU threads of each process; None shares all cores out."""
    max_pixels: Annotated[int | None, Range(1)] = None
    """The most pixels of an image that is decoded; None means 1,000,000,000."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which images, which model, and where the results go."""

    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="input", metavar="INPUT", help_behavior_hint="(one or more)"),
        tyro.conf.Positional,
    ]
    """Image files, folders that are searched at any depth, or patterns in quotes, such as "photos/**/*.jpg"."""
    model: str
    """The folder of a run, a folder that save_pretrained wrote, or a model's name on the Hugging Face hub."""
    output: Path
    """Folder of the results."""
    results: Results = Results()
    """What is written."""
    views: Views = Views()
    """The protocol."""
    machine: Machine = Machine()
    """Device and speed."""


def main(config: Config) -> None:
    """Run the command."""
    if config.results.json:
        logging.getLogger("segheads").setLevel(logging.CRITICAL)  # standard output is for the JSON alone
    check_ranges(config)
    kinds = kinds_of(config.results)
    if not config.inputs:
        raise OptionError("no INPUT was given; name image files, folders or patterns")
    if config.output.exists() and not config.output.is_dir():
        raise OptionError(f"--output {config.output} is a file; give a folder")
    paths = find_images(config.inputs, config.output)
    accelerator = Accelerator(cpu=config.machine.device == "cpu")
    share_cores(accelerator, config.machine.threads)
    with ExitStack() as stack:
        from_main(accelerator, lambda: stack.enter_context(only_process(config.output, "folder of results")))
        stack.enter_context(pixel_limit(config.machine.max_pixels))
        failed = label_all(config, accelerator, paths, kinds)
        accelerator.wait_for_everyone()  # the main process has the folder
    accelerator.end_training()
    if failed:
        raise SystemExit(1)


def label_all(config: Config, accelerator: Accelerator, paths: Sequence[Path], kinds: Kinds) -> list[tuple[str, str]]:
    """Label what is not done yet; gives the images that failed, with the reason."""
    predictor = open_predictor(config.model, config.views, config.machine, accelerator)
    record = Record.read(config.output, key_of(predictor))
    sources = name_results(paths, record.entries)
    accelerator.wait_for_everyone()  # all have read before the first writes
    wanted = kinds.wanted()
    todo = [source for source in sources if config.results.redo or not record.is_done(source, wanted)]
    own = todo[accelerator.process_index :: accelerator.num_processes]
    log.info(
        f"{len(todo)} of {len(sources)} images to label, {len(sources) - len(todo)} are done; "
        f"{accelerator.num_processes} process(es) on {predictor.device.type}, {shown(predictor.protocol)}"
    )
    failed: list[tuple[str, str]] = []
    try:
        label(predictor, own, record, kinds, failed, config, is_main=accelerator.is_main_process)
    finally:  # also after Ctrl-C
        if accelerator.num_processes == 1:
            record.write_shares(predictor.classes.names)
    accelerator.wait_for_everyone()
    failed = gather_object(failed) if accelerator.num_processes > 1 else failed
    if accelerator.is_main_process:
        if accelerator.num_processes > 1:
            Record.read(config.output, record.key).write_shares(predictor.classes.names)
        report(config, len(todo) - len(failed), len(sources) - len(todo), failed)
    return failed


def kinds_of(results: Results) -> Kinds:
    """What is wanted of each image."""
    return Kinds(results.overlay, results.opacity, results.probability, results.uncertainty)


def open_predictor(model: str, views: Views, machine: Machine, accelerator: Accelerator) -> Predictor:
    """The model on its device, with the protocol that is asked for."""
    predictor = Predictor.from_pretrained(
        model,
        mixed_precision=machine.mixed_precision or launched_precision(),
        batch_size=machine.batch_size,
    )
    predictor.protocol = views.of(predictor.protocol)
    with options_become_parts():
        predictor.protocol.check_threshold(predictor.model.num_classes)
    device = machine.device or accelerator.device
    try:
        predictor.model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's own words: no such device, or not in this build
        raise OptionError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return predictor


def label(
    predictor: Predictor,
    sources: Sequence[Source],
    record: Record,
    kinds: Kinds,
    failed: list[tuple[str, str]],
    config: Config,
    *,
    is_main: bool,
) -> None:
    """Label the images of this process; what fails is told at once and noted."""
    is_hidden = None if is_main else True  # None: where there is no terminal
    bar = tqdm(total=len(sources), unit=" images", leave=False, dynamic_ncols=True, disable=is_hidden)
    with bar:
        for source, error in label_files(predictor, sources, record, kinds, workers=config.machine.workers):
            bar.update()
            if error is not None:
                failed.append((readable(str(source.path)), words_of(source, error)))
                tqdm.write(f"error: {failed[-1][1]}", file=sys.stderr)


def words_of(source: Source, error: Exception) -> str:
    """One line that names the image."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        text = f"the memory does not hold it ({text}); give --window, or a smaller --scale"
    name = readable(str(source.path))
    text = readable(text)
    return text if name in text else f"{name}: {text}"


def report(config: Config, done: int, unchanged: int, failed: Sequence[tuple[str, str]]) -> None:
    """Say what was done, in words or in JSON."""
    if config.results.json:
        told: dict[str, Any] = {"output": str(config.output), "labelled": done, "unchanged": unchanged}
        print(json.dumps({**told, "failed": [{"input": path, "error": error} for path, error in failed]}))
        return
    log.info(
        "%d labelled, %d were done before, %d failed; results are in %s", done, unchanged, len(failed), config.output
    )


def shown(protocol: InferenceProtocol) -> str:
    """The protocol in words."""
    parts = [f"windows of {protocol.window}" if protocol.window else "whole images"]
    parts += [f"resized into {protocol.scale[0]} x {protocol.scale[1]}"] if protocol.scale else []
    parts += [f"scales {', '.join(map(str, protocol.scales))}"] if protocol.scales != (1.0,) else []
    return ", ".join(parts + ["mirrored too"] * protocol.flip)
