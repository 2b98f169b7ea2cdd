"""Small scenes drawn by the code itself: a data set that needs no files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from typing_extensions import Self, override

from segheads.classes import Palette
from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset, check_split

CLASS_NAMES = ("sky", "cloud", "hill", "grass", "road", "water", "wall", "roof", "window", "tree", "car", "person")
SKY, CLOUD, HILL, GRASS, ROAD, WATER, WALL, ROOF, WINDOW, TREE, CAR, PERSON = range(12)
PALETTE: Palette = (
    (70, 130, 180),
    (220, 230, 240),
    (130, 110, 160),
    (120, 200, 80),
    (128, 64, 128),
    (30, 60, 200),
    (200, 170, 120),
    (170, 50, 40),
    (250, 230, 60),
    (30, 100, 40),
    (0, 0, 142),
    (220, 20, 60),
)
_SPLITS = ("train", "val")
_Colour = tuple[float, float, float]
_Box = tuple[float, float, float, float]


class Scenes(SegmentationDataset):
    """Landscapes with houses, trees, cars and people, drawn with random shapes, colours, light and noise.

    Made to learn and test with: every class has a look of its own that varies, and things stand in front of each
    other, the farther the smaller. An image is a function of (seed, split, index) alone.

    Args:
        split: `"train"` or `"val"`, which share no image.
        size: `(height, width)` in pixels.
        length: How many images.
        seed: Another number draws other images.

    Shape:
        As every `SegmentationDataset`; 12 classes, no pixel ignored.

    Raises:
        ValueError: The split is unknown.

    Examples:
        >>> scenes = Scenes("val", size=(96, 128), length=8)
        >>> image, labels = scenes[0]
        >>> image.shape, labels.shape, scenes.class_names[labels[0, 0]]
        (torch.Size([3, 96, 128]), torch.Size([96, 128]), 'sky')
    """

    options = frozenset({"scenes_size"})

    def __init__(self, split: str = "train", *, size: tuple[int, int] = (128, 128), length: int = 2000, seed: int = 0):
        super().__init__(CLASS_NAMES, PALETTE)
        check_split(split, _SPLITS)
        self.split = split
        self.size = size
        self.length = length
        self.seed = seed

    @classmethod
    @override
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:
        """Open 2000 square scenes for training, drawn by the seed, or for validation 100 that are always the same."""
        size = (config.scenes_size, config.scenes_size)
        return cls(split, size=size, **({"length": 100} if split == "val" else {"length": 2000, "seed": seed}))

    @classmethod
    @override
    def fetch(cls, root: Path) -> None:
        """Do nothing: the code draws the scenes."""

    @classmethod
    @override
    def find_root(cls, config: DataConfig) -> Path:
        """Return any path: scenes lie nowhere."""
        return config.data_root or Path()

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Return split and index."""
        return f"{self.split}_{index:05d}"

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """Draw one image and its uint8 labels `(H, W)`."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} is outside the {self.length} scenes of this data set")
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), index])
        scene = _Scene(*self.size, rng)
        scene.draw_land()
        scene.draw_things()
        return scene.photograph()


class _Scene:
    """Two pictures painted together from far to near: base colours and labels; `photograph` adds texture and light."""

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.height, self.width, self.rng = height, width, rng
        self.horizon = height * rng.uniform(0.3, 0.5)
        self.colours = Image.new("RGB", (width, height), self._colour((110, 170, 235), 20))
        self.labels = Image.new("L", (width, height), SKY)
        self.pens = (ImageDraw.Draw(self.colours), ImageDraw.Draw(self.labels))

    def draw_land(self) -> None:
        """Draw clouds, hills, grass, at times a lake, and a road that runs to the horizon."""
        rng, width, height, horizon = self.rng, self.width, self.height, self.horizon
        for _ in range(rng.integers(1, 4)):
            self._cloud(rng.uniform(0, width), rng.uniform(0.1, 0.6) * horizon, rng.uniform(0.1, 0.2) * width)
        self._hills()
        self._polygon([(0, horizon), (width, horizon), (width, height), (0, height)], GRASS, (100, 160, 55), 18)
        if rng.random() < 0.8:
            far, near = horizon + np.array([rng.uniform(0, 0.1), rng.uniform(0.4, 0.7)]) * (height - horizon)
            left, right = sorted(rng.uniform(-0.3, 1.3, 2) * width)
            shore = [(left, far), (right + 0.3 * width, far), (right + 0.5 * width, near), (left - 0.2 * width, near)]
            self._polygon(shore, WATER, (30, 75, 160), 18)
        end, start, half = rng.uniform(0.2, 0.8) * width, rng.uniform(0.1, 0.9) * width, rng.uniform(0.2, 0.4) * width
        road = [(end - 2, horizon), (end + 2, horizon), (start + half, height), (start - half, height)]
        self._polygon(road, ROAD, (105, 98, 105), 14)

    def draw_things(self) -> None:
        """Draw houses, trees, cars and people where they stand on the ground, the farthest first."""
        rng = self.rng
        kinds = [self._house] * rng.integers(1, 4) + [self._tree] * rng.integers(2, 5)
        kinds += [self._car] * rng.integers(1, 4) + [self._person] * rng.integers(2, 5)
        nearness = np.sort(rng.uniform(0.2, 1.0, len(kinds)))
        for place, kind in enumerate(rng.permutation(len(kinds))):
            ground = self.horizon + nearness[place] ** 1.5 * (self.height - self.horizon)
            kinds[kind](rng.uniform(0, self.width), ground, nearness[place] * self.height)

    def photograph(self) -> tuple[Image.Image, Tensor]:
        """Add the texture of each class, light that falls off to one side, a colour cast and noise."""
        rng, labels = self.rng, np.array(self.labels)
        pixels = np.asarray(self.colours).astype(np.float32)
        for label, texture in self._textures().items():
            pixels += (texture * (labels == label))[..., None]
        left, right = rng.uniform(0.8, 1.15, 2)
        light = np.linspace(left, right, self.width, dtype=np.float32)[:, None]
        pixels = pixels * light + rng.uniform(-10, 10, 3).astype(np.float32)
        pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(3, 8))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)

    def _textures(self) -> dict[int, NDArray[np.float32]]:
        """Return grey levels to add, by class."""
        rng, size = self.rng, (self.height, self.width)
        grain = rng.standard_normal(size, dtype=np.float32)
        spots = rng.integers(0, 256, (self.height // 4 + 1, self.width // 4 + 1), dtype=np.uint8)
        blotches = (
            np.asarray(Image.fromarray(spots).resize(size[::-1], Image.Resampling.BILINEAR)) / np.float32(128) - 1
        )
        y, x = np.arange(self.height, dtype=np.float32)[:, None], np.arange(self.width, dtype=np.float32)
        courses = np.where(y % 4 < 1, -26, 0) + np.where((x + y // 4 % 2 * 4) % 8 < 1, -18, 0)
        return {
            SKY: np.broadcast_to(30 * y / self.height, size),
            CLOUD: 16 * blotches,
            HILL: 14 * blotches,
            GRASS: 20 * grain,
            ROAD: 6 * grain,
            WATER: 16 * np.sin(y * rng.uniform(1.2, 2.0) + 2 * blotches),
            WALL: courses.astype(np.float32),
            ROOF: np.where((x + y) % 5 < 2, np.float32(-28), np.float32(0)),
            TREE: 34 * blotches + 10 * grain,
        }

    def _hills(self) -> None:
        for level in (0.8, 0.4)[: self.rng.integers(1, 3)]:
            x = np.linspace(0, self.width, 17)
            waves = np.sin(x / self.width * self.rng.uniform(3, 9) + self.rng.uniform(0, 6))
            tops = self.horizon * (1 - 0.5 * level) + waves * 0.06 * self.height
            outline = [*zip(x, tops, strict=True), (self.width, self.horizon + 1), (0, self.horizon + 1)]
            self._polygon(outline, HILL, (125 - 40 * (1 - level), 105, 150), 16)

    def _cloud(self, x: float, y: float, size: float) -> None:
        colour = self._colour((238, 238, 240), 10)
        for _ in range(4):
            dx, dy = self.rng.uniform(-0.8, 0.8) * size, self.rng.uniform(-0.15, 0.15) * size
            self._ellipse((x + dx - size, y + dy - size / 2.5, x + dx + size, y + dy + size / 2.5), CLOUD, colour)

    def _house(self, x: float, ground: float, size: float) -> None:
        wide, high, top = self.rng.uniform(0.25, 0.42) * size, self.rng.uniform(0.3, 0.5) * size, 0.22 * size
        wall = ((215, 185, 140), (205, 195, 185), (190, 140, 110))[self.rng.integers(3)]
        self._box((x - wide, ground - high, x + wide, ground), WALL, self._colour(wall, 14))
        roof = [(x - 1.15 * wide, ground - high), (x - 0.5 * wide, ground - high - top)]
        roof += [(x + 0.5 * wide, ground - high - top), (x + 1.15 * wide, ground - high)]
        self._polygon(roof, ROOF, (175, 60, 45), 20)
        pane = self._colour(((60, 70, 90), (250, 225, 120))[self.rng.integers(2)], 12)
        for column in (-0.6, 0.0, 0.6) if wide > 0.3 * size else (-0.45, 0.45):
            left, upper = x + (column - 0.19) * wide, ground - 0.78 * high
            self._box((left, upper, left + 0.38 * wide, upper + 0.48 * high), WINDOW, pane)

    def _tree(self, x: float, ground: float, size: float) -> None:
        crown, trunk = self.rng.uniform(0.14, 0.24) * size, 0.035 * size
        self._box((x - trunk, ground - 2 * crown, x + trunk, ground), TREE, self._colour((95, 65, 40), 10))
        leaves = self._colour((35, 85, 40), 16)
        middle = ground - 2.1 * crown
        if self.rng.random() < 0.4:  # a fir
            fir = [(x - crown, ground - 0.6 * crown), (x, ground - 4.2 * crown), (x + crown, ground - 0.6 * crown)]
            self._polygon(fir, TREE, leaves, 0)
            return
        for dx, dy in ((0, 0), (-0.6, 0.3), (0.6, 0.3), (0, -0.6)):
            left, upper = x + (dx - 0.8) * crown, middle + (dy - 0.8) * crown
            self._ellipse((left, upper, left + 1.6 * crown, upper + 1.6 * crown), TREE, leaves)

    def _car(self, x: float, ground: float, size: float) -> None:
        long, high = self.rng.uniform(0.17, 0.22) * size, 0.11 * size
        paint = self._colour(((190, 30, 130), (240, 200, 40), (30, 190, 190))[self.rng.integers(3)], 15)
        self._box((x - long, ground - 1.5 * high, x + long, ground - 0.35 * high), CAR, paint)
        cabin = [(x - 0.65 * long, ground - 1.5 * high), (x - 0.4 * long, ground - 2.4 * high)]
        cabin += [(x + 0.4 * long, ground - 2.4 * high), (x + 0.65 * long, ground - 1.5 * high)]
        self._polygon(cabin, CAR, paint, 0)
        for side in (-0.55, 0.55):
            wheel = (x + side * long - 0.4 * high, ground - 0.8 * high, x + side * long + 0.4 * high, ground)
            self._ellipse(wheel, CAR, (25, 25, 28))

    def _person(self, x: float, ground: float, size: float) -> None:
        wide, high = 0.055 * size, self.rng.uniform(0.3, 0.4) * size
        shirt = self._colour(((235, 90, 20), (120, 40, 170))[self.rng.integers(2)], 15)
        self._box((x - wide, ground - 0.45 * high, x + wide, ground), PERSON, self._colour((35, 40, 75), 8))
        self._box((x - 1.2 * wide, ground - 0.85 * high, x + 1.2 * wide, ground - 0.42 * high), PERSON, shirt)
        head = (x - 0.9 * wide, ground - high - 0.4 * wide, x + 0.9 * wide, ground - high + 1.4 * wide)
        self._ellipse(head, PERSON, self._colour((225, 170, 140), 12))

    def _colour(self, colour: _Colour, spread: float) -> tuple[int, int, int]:
        red, green, blue = (int(value) for value in np.clip(colour + self.rng.uniform(-spread, spread, 3), 0, 255))
        return red, green, blue

    def _polygon(self, outline: Sequence[tuple[float, float]], label: int, colour: _Colour, spread: float) -> None:
        self.pens[0].polygon(outline, fill=self._colour(colour, spread))
        self.pens[1].polygon(outline, fill=label)

    def _box(self, box: _Box, label: int, colour: tuple[int, int, int]) -> None:
        self.pens[0].rectangle(box, fill=colour)
        self.pens[1].rectangle(box, fill=label)

    def _ellipse(self, box: _Box, label: int, colour: tuple[int, int, int]) -> None:
        self.pens[0].ellipse(box, fill=colour)
        self.pens[1].ellipse(box, fill=label)
