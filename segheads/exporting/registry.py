"""Formats by name. The table itself is in `segheads/exporting/__init__.py`, which imports every format."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from segheads.errors import PackageMissingError
from segheads.exporting.deployed import Deployed

Precision = Literal["fp32", "fp16", "int8"]
Runner = Callable[[Tensor], list[Tensor]]
"""From images `(B, C, H, W)` to the graph's outputs, in their order."""


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Args:
        deployed: Model and outputs.
        size: Height and width of the images, pixels; None means any.
        batch_size: How many images at a time; None means any number.
        precision: Of the network.
        opset: Of ONNX.
        metadata: What the file is to say of itself.
        calibration: Images `(1, C, H, W)`, for int8.
    """

    deployed: Deployed
    size: tuple[int, int] | None = None
    batch_size: int | None = None
    precision: Precision = "fp32"
    opset: int = 18
    metadata: Mapping[str, str] | None = None
    calibration: Sequence[Tensor] = ()


class Format(ABC):
    """A kind of file that holds a model for another runtime.

    Attributes:
        suffix: What files end with, with its dot.
        beside: Suffixes of further files of the same name, without which the first is of no use.
        packages: What has to be installed.
        precisions: What networks may compute in.
    """

    suffix: ClassVar[str]
    beside: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "export"
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "fp16")
    why_fixed: ClassVar[str | None] = None  # the reason, where the format itself takes one size only

    @abstractmethod
    def write(self, job: Job, path: Path) -> None:
        """Write a graph of all the outputs of `job.deployed`.

        Args:
            job: What to write.
            path: The file; those `beside` it have its name.
        """

    @abstractmethod
    def load(self, path: Path) -> Runner:
        """What is in a file, as its runtime reads it.

        Args:
            path: The file.
        """

    def narrow(self, job: Job, path: Path) -> None:
        """Leave the outputs of `job.deployed` alone in a file that has more; by default it is written anew.

        Args:
            job: As it was written, with fewer outputs.
            path: The file.
        """
        self.write(job, path)

    def check_packages(self) -> None:
        """Refuse to begin without the packages.

        Raises:
            PackageMissingError: If one is not installed.
        """
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise PackageMissingError(
                f'this format needs {", ".join(missing)}, which is not installed: pip install "segheads[{self.extra}]"'
            )


FORMATS: dict[str, Format] = {}
"""The formats by the names that `export` and `--format` take; a name of your own may be added."""


def find_format(name: str) -> Format:
    """The format of a name.

    Args:
        name: A name in `FORMATS`.

    Raises:
        ValueError: If no format has that name; the message lists the known ones.
    """
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {name!r}{hint}")
    return FORMATS[name]
