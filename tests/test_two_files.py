"""A new part of each kind touches two files at most: tests, recipes, reports and API pages follow from registries."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ["segheads", "recipes", "tests", "docs", "mkdocs.yml", "pyproject.toml", "README.md"]
NAME = "newcomer"  # of every new part

HEAD = '''"""A head for the test of two files."""

from torch import Tensor, nn

from segheads.heads.base import Head


class NewcomerHead(Head):
    """Two layers, position by position."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.layers = nn.Sequential(nn.Conv2d(in_channels, 16, 1), nn.GELU(), nn.Conv2d(16, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a map."""
        self._check(x)
        return self.layers(x)
'''

DATASET = '''"""A data set for the test of two files."""

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset


class Newcomer(SegmentationDataset):
    """A bright half beside a dark one."""

    def __init__(self) -> None:
        super().__init__(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))

    @classmethod
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:
        """Open it; both splits are the same."""
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val; got {split!r}")
        return cls()

    def __len__(self) -> int:
        return 8

    def name(self, index: int) -> str:
        """The number."""
        return str(range(len(self))[index])

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """The halves meet at another column in each image."""
        labels = torch.zeros(40, 48, dtype=torch.uint8)
        labels[:, 10 + 4 * range(len(self))[index] :] = 1
        return Image.fromarray((200 * labels).numpy()).convert("RGB"), labels
'''

METRIC = '''"""A metric for the test of two files."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from segheads.metrics.base import SegmentationMetric
from segheads.metrics.maps import class_maps


class Newcomer(SegmentationMetric):
    """Share of the labelled pixels that are wrong."""

    scores: ClassVar[Mapping[str, str]] = {"newcomer": "wrong pixels"}
    wrong: Tensor
    pixels: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(num_classes, ignore_index, **kwargs)
        for name in ("wrong", "pixels"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        preds, labels = class_maps(preds, labels, self.num_classes, self.ignore_index)
        labelled = labels < self.num_classes
        self.wrong = self.wrong + (labelled & (preds != labels)).sum()
        self.pixels = self.pixels + labelled.sum()

    def compute(self) -> dict[str, Tensor]:
        """The share."""
        return {"newcomer": self.wrong.cpu().double() / self.pixels.cpu()}
'''

MERGE = '''def newcomer(logits: Sequence[Tensor]) -> Tensor:
    """At each position, the learner that is surest of its best class."""
    each = torch.stack(_log_probabilities(logits))
    speaker = each.amax(2, keepdim=True).argmax(0, keepdim=True)
    return each.gather(0, speaker.expand(1, *each.shape[1:]))[0]


'''

PYRAMID = '''class Newcomer(FPN):
    """A feature pyramid of half the values."""

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The pyramid's maps, fine to coarse."""
        return [level / 2 for level in super().forward(maps)]


'''

KERNEL = '''class Newcomer(Kernel):
    """Distances of squashed tokens."""

    by_distance = True

    def measured(self, r: Tensor) -> Tensor:
        """The tokens, squashed."""
        return r.tanh()


'''

LOSS = '''"""A loss."""

from torch import Tensor

from segheads.losses.cross_entropy import CrossEntropy


class Newcomer(CrossEntropy):
    """Cross-entropy, doubled."""

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The loss."""
        return 2 * super().compute(logits, labels, pixels)
'''


def insert(path, where, text):
    """Put text at the first match of a pattern, which is empty."""
    before = path.read_text()
    place = re.search(where, before, re.MULTILINE)
    assert place, f"{path} has no {where}"
    path.write_text(before[: place.start()] + text + before[place.end() :])


def own_file(package, registry, class_name, code):
    """A part in a file of its own; import, line of the registry and line of `__all__` in its package."""

    def add(root):
        folder = root / "segheads" / package
        (folder / f"{NAME}.py").write_text(code)
        insert(folder / "__init__.py", r"(?=^from segheads)", f"from segheads.{package}.{NAME} import {class_name}\n")
        insert(folder / "__init__.py", rf"(?<=^{registry} \|= {{\n)", f'    "{NAME}": {class_name},\n')
        insert(folder / "__init__.py", r"(?<=^__all__ = \[\n)", f'    "{class_name}",\n')

    return add


def same_file(path, registry, code, value):
    """A part in the file of its registry, and its line there."""

    def add(root):
        insert(root / path, rf"(?=^{registry}: )", code)
        insert(root / path, r'(?=^}\n"""The \w+ by the names)', f'    "{NAME}": {value},\n')

    return add


PARTS = {
    "head": own_file("heads", "HEADS", "NewcomerHead", HEAD),
    "data set": own_file("data", "DATASETS", "Newcomer", DATASET),
    "merge": same_file("segheads/merges.py", "MERGES", MERGE, "newcomer"),
    "pyramid": same_file("segheads/pyramids.py", "PYRAMIDS", PYRAMID, "Newcomer"),
    "kernel": same_file("segheads/functional/kernels.py", "KERNELS", KERNEL, "Newcomer()"),
    "loss": own_file("losses", "LOSSES", "Newcomer", LOSS),
    "metric": own_file("metrics", "METRICS", "Newcomer", METRIC),
}
TESTS = {
    "head": "tests/heads/test_registry.py",
    "data set": "tests/data/test_registry.py",
    "merge": "tests/test_merges.py",
    "pyramid": "tests/test_pyramids.py",
    "kernel": "tests/functional/test_kernels.py",
    "loss": "tests/test_losses.py",
    "metric": "tests/metrics/test_registry.py",
}
ENTRIES = {
    "head": "segheads.heads.NewcomerHead",
    "data set": "segheads.data.Newcomer",
    "merge": "segheads.merges.newcomer",
    "pyramid": "segheads.pyramids.Newcomer",
    "kernel": "segheads.functional.kernels.Newcomer",
    "loss": "segheads.losses.Newcomer",
    "metric": "segheads.metrics.Newcomer",
}
KINDS = [kind for kind in PARTS if (ROOT / TESTS[kind]).is_file()]
TINY = ["--demo", "--iterations", "2", "--dataset", NAME, "--loss", NAME, "--scale", "48", "40", "--crop-size", "32"]
TINY += ["--batch-size", "2", "--tracker", "none", "--pictures", "0", "--checkpoint-every", "2", "--threads", "1"]
RECIPES = {
    "meanshifter_ade20k": ["--backbone", "test_vit", "--depth", "1", "--decoder", NAME, "--kernel", NAME],
    "senformer_ade20k": ["--pyramid", NAME, "--width", "16", "--learner", NAME, "--merge", NAME],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with one more part of each kind, and the files that each of them touched."""
    root = tmp_path_factory.mktemp("two_files") / "checkout"
    root.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, root / name, **options)
    touched, before = {}, files(root)
    for kind in KINDS:
        PARTS[kind](root)
        after = files(root)
        touched[kind] = sorted(path for path in after if before.get(path) != after[path])
        before = after
    return root, touched


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run(root, *arguments):
    """Run Python in the copy; returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_touches_two_files_at_most(checkout, kind):
    touched = checkout[1][kind]
    assert 1 <= len(touched) <= 2
    assert all(path.startswith("segheads/") for path in touched)


def test_tests_over_the_registries_take_it_in(checkout):
    options = ["-v", "-k", NAME, "-p", "no:cacheprovider", "-p", "no:xdist"]
    shown = run(checkout[0], "-m", "pytest", *options, *(TESTS[kind] for kind in KINDS), "tests/test_docs.py")
    for kind in KINDS:
        assert re.search(rf"^{TESTS[kind]}::\S+{NAME}\S* PASSED", shown, re.MULTILINE), shown
        assert (
            f"tests/test_docs.py::test_everything_registered_has_an_entry_on_an_api_page[{kind}-{NAME}] PASSED" in shown
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_and_reports_take_it_in(checkout, recipe, tmp_path):
    run(checkout[0], f"recipes/{recipe}.py", *TINY, *RECIPES[recipe], "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in results["classes"]] == ["dark", "bright"]
    if "metric" in KINDS:
        options = ["--model", tmp_path / "run", "--workers", "0", "--pictures", "0", "--threads", "1"]
        run(checkout[0], "-m", "segheads", "evaluate", *options)
        assert NAME in json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
        assert "wrong pixels" in (tmp_path / "run" / "evaluation" / "results.md").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("mkdocstrings"), reason="the documentation's packages are not there")
def test_api_pages_take_it_in(checkout, tmp_path):
    run(checkout[0], "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    compressed = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}
    assert {ENTRIES[kind] for kind in KINDS} <= entries
