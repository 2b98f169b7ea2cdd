"""Images per second per core of the training input: the published OpenCV pipeline against ours.

    python recipes/benchmark/input.py
    python recipes/benchmark/input.py --images DIR --labels DIR

Needs `pip install opencv-python-headless`. The three pipelines take turns on the same files with one thread each;
seconds are those of the processor, so that other work on the machine counts little; ratios are medians over the turns.
Stacking a batch is part of it, moving it to a device is not.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from segheads.cli.run import run
from segheads.data import (
    FolderDataset,
    PhotometricNormalize,
    RandomScaleCrop,
    Scenes,
    TrainingSamples,
    collate_samples,
)
from segheads.ranges import SEED_LIMIT, Range

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 512


@dataclass(frozen=True)
class Config:
    """What to measure."""

    images: Path | None = None  # by default scenes are drawn and saved as 683x512 JPEG
    labels: Path | None = None
    num_images: Annotated[int, Range(1)] = 32  # images per turn; fewer files are used again, with other crops
    batch_size: Annotated[int, Range(1)] = 8
    turns: Annotated[int, Range(1)] = 7
    seed: Annotated[int, Range(0, SEED_LIMIT)] = 0
    json: Path | None = None  # also write the results here


def main(config: Config) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = config.images, config.labels
        if images is None or labels is None:
            images, labels = make_files(Path(folder), config.num_images)
        dataset = FolderDataset(images, labels, 254, reduce_zero_label=True)  # every value allowed, as in ADE20K
        size = statistics.mean(image.stat().st_size for image, _ in dataset.files) / 1000
        print(f"{len(dataset)} files, {size:.0f} kB on average")
        report(config, measure(config, dataset))


def measure(config: Config, dataset: FolderDataset, *, decodes: bool = False) -> dict[str, list[float]]:
    """Return the seconds of each turn over all images, by pipeline; on demand also those of the decoders alone."""
    batches = [range(first, first + config.batch_size) for first in range(0, config.num_images, config.batch_size)]
    samples = TrainingSamples(dataset, RandomScaleCrop(CROP), seed=config.seed)
    prepare = PhotometricNormalize(MEAN, STD)
    published = PublishedPipeline(config.seed)

    def run_published(_turn: int, batch: range) -> Any:
        return default_collate([published(*dataset.files[index % len(dataset)]) for index in batch])

    def run_hand_over(turn: int, batch: range) -> Any:
        # Another epoch for every use of a file: another crop.
        return collate_samples([samples[turn * 1000 + index, index % len(dataset)] for index in batch])

    def run_all(turn: int, chosen: range) -> Any:
        batch = run_hand_over(turn, chosen)
        return prepare(batch["image"], batch["distortion"], batch["valid"]), batch["labels"].long()

    def run_decoders(_turn: int, batch: range) -> None:
        for index in batch:
            for file in dataset.files[index % len(dataset)]:
                with Image.open(file) as image:
                    image.load()

    pipelines: dict[str, Callable[[int, range], Any]] = {
        "published (OpenCV)": run_published,
        "ours, up to the hand-over": run_hand_over,
        "ours, all on the CPU": run_all,
    }
    if decodes:
        pipelines["decoding alone"] = run_decoders
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(config.turns + 1):
        for name, pipeline in pipelines.items():
            start = time.process_time()
            for batch in batches:
                pipeline(turn, batch)
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def report(config: Config, seconds: dict[str, list[float]]) -> None:
    """Print the table, and write it as JSON if asked."""
    num_images = math.ceil(config.num_images / config.batch_size) * config.batch_size
    baseline = next(iter(seconds.values()))
    rows = []
    print(f"{'pipeline':28}{'images/s/core':>14}{'ratio':>8}{'lowest':>8}{'highest':>9}")
    for name, turns in seconds.items():
        rate = num_images / statistics.median(turns)
        ratios = [slow / quick for slow, quick in zip(baseline, turns, strict=True)]
        ratio = statistics.median(ratios)
        rows.append({"pipeline": name, "images_per_second": rate, "ratio": ratio, "ratios": ratios})
        print(f"{name:28}{rate:14.1f}{ratio:8.2f}{min(ratios):8.2f}{max(ratios):9.2f}")
    if config.json:
        config.json.write_text(
            json.dumps({"config": asdict(config), "results": rows}, default=str, indent=2), encoding="utf-8"
        )


def make_files(folder: Path, num_images: int) -> tuple[Path, Path]:
    """Draw scenes, enlarge them, and save them as JPEG of about the 53 kB that ADE20K has at this size, and PNG."""
    scenes = Scenes("train", size=(256, 342), length=num_images)
    images, labels = folder / "images", folder / "labels"
    images.mkdir()
    labels.mkdir()
    rng = np.random.default_rng(0)
    for index in range(num_images):
        image, classes = scenes.read(index)
        pixels = np.asarray(image.resize((683, 512), Image.Resampling.BICUBIC)) + rng.normal(0, 1.0, (512, 683, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{index:03d}.jpg", quality=75)
        label = Image.fromarray(classes.numpy()).resize((683, 512), Image.Resampling.NEAREST)
        label.save(labels / f"{index:03d}.png")
    return images, labels


class PublishedPipeline:
    """MMSegmentation's training pipeline for ADE20K, written out with the OpenCV calls that mmcv makes.

    https://github.com/open-mmlab/mmsegmentation (datasets/pipelines) and https://github.com/open-mmlab/mmcv (image/).
    """

    def __init__(self, seed: int):
        try:
            import cv2
        except ImportError as error:
            raise SystemExit("the published pipeline needs OpenCV: pip install opencv-python-headless") from error
        cv2.setNumThreads(1)
        self.cv2: Any = cv2
        self.rng = np.random.default_rng(seed)

    def __call__(self, image_path: Path, label_path: Path) -> tuple[Tensor, Tensor]:
        """Return the normalised crop and its int64 labels."""
        cv2, rng = self.cv2, self.rng
        image = cv2.imdecode(np.frombuffer(image_path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        labels = np.array(Image.open(label_path)).squeeze().astype(np.uint8)  # mmcv reads labels with Pillow, too
        labels[labels == 0] = 255
        labels -= 1
        labels[labels == 254] = 255
        image, labels = self._resize(image, labels)
        image, labels = self._crop(image, labels)
        if rng.random() < 0.5:
            image, labels = np.flip(image, 1), np.flip(labels, 1)
        image = self._distort(image)
        image = image.copy().astype(np.float32)
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image)
        cv2.subtract(image, np.array(MEAN)[None] * 255, image)
        cv2.multiply(image, 1 / (np.array(STD)[None] * 255), image)
        bottom, right = CROP - image.shape[0], CROP - image.shape[1]
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=0)
        labels = cv2.copyMakeBorder(labels, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=255)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(
            labels.astype(np.int64)
        )

    def _resize(self, image: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        ratio = self.rng.uniform(0.5, 2.0)
        height, width = image.shape[:2]
        factor = min(int(2048 * ratio) / max(height, width), int(512 * ratio) / min(height, width))
        size = int(width * factor + 0.5), int(height * factor + 0.5)
        resized = self.cv2.resize(image, size, interpolation=self.cv2.INTER_LINEAR)
        return resized, self.cv2.resize(labels, size, interpolation=self.cv2.INTER_NEAREST)

    def _crop(self, image: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        def draw() -> tuple[slice, slice]:
            top, left = (int(self.rng.integers(max(side - CROP, 0) + 1)) for side in labels.shape)
            return slice(top, top + CROP), slice(left, left + CROP)

        box = draw()
        for _ in range(10):
            values, counts = np.unique(labels[box], return_counts=True)
            counts = counts[values != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
            box = draw()
        return image[box], labels[box]

    def _distort(self, image: NDArray[Any]) -> NDArray[Any]:
        cv2, rng = self.cv2, self.rng

        def convert(values: NDArray[Any], alpha: float = 1.0, beta: float = 0.0) -> NDArray[Any]:
            return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

        if rng.integers(2):
            image = convert(image, beta=rng.uniform(-32, 32))
        contrast_first = rng.integers(2)
        if contrast_first and rng.integers(2):
            image = convert(image, alpha=rng.uniform(0.5, 1.5))
        if rng.integers(2):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            image[:, :, 1] = convert(image[:, :, 1], alpha=rng.uniform(0.5, 1.5))
            image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
        if rng.integers(2):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            image[:, :, 0] = (image[:, :, 0].astype(int) + rng.integers(-18, 18)) % 180
            image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
        if not contrast_first and rng.integers(2):
            image = convert(image, alpha=rng.uniform(0.5, 1.5))
        return image


if __name__ == "__main__":
    run(main, Config)
