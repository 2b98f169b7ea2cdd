"""Which value, or which colour, of a label file is which class."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from segheads.classes import ignored_label
from segheads.data.labels import read_label_colours, read_labels
from segheads.errors import DataMissingError, OptionError, UnknownLabelError

Colour = tuple[int, int, int]
IGNORE = "ignore"  # the word of JSON files for "no class"; null is another
_UNKNOWN = -2  # -1 is an ignored label


@dataclass(frozen=True)
class LabelMap:
    """The class of each value, or of each colour, of label files; several may be one class.

    What is not named is an error: no value is ignored unless the map says so.

    Args:
        classes: Value, or RGB colour, to class index, or to None for "no class".

    Raises:
        ValueError: If the map is empty, mixes values and colours, or a number is out of range.

    Examples:
        >>> masks = LabelMap({0: 0, 255: 1, 7: None})
        >>> masks.to_classes(np.array([[0, 255, 7]], np.uint8), 2, path="a.png").tolist()
        [[0, 1, 255]]
        >>> LabelMap({(255, 0, 0): 0, (0, 0, 255): 1}).as_json()
        {'#ff0000': 0, '#0000ff': 1}
    """

    classes: Mapping[int | Colour, int | None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", dict(self.classes))
        if not self.classes:
            raise ValueError("a label map needs one value or colour, or more; got none")
        if len({isinstance(key, tuple) for key in self.classes}) > 1:
            raise ValueError("a label map has values or colours, not both")
        for key, target in self.classes.items():
            if isinstance(key, tuple) and (len(key) != 3 or not all(0 <= part <= 255 for part in key)):
                raise ValueError(f"a colour is three numbers from 0 to 255; got {key}")
            if target is not None and target < 0:
                raise ValueError(f"a class is 0 or more, or None for ignored; got {target} for {shown(key)}")

    @classmethod
    def from_values(cls, values: Sequence[int]) -> Self:
        """The map of files in which the first value is class 0, the second class 1, and so on.

        Args:
            values: One for each class.

        Raises:
            ValueError: If a value stands twice, or there is none.
        """
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise ValueError(f"label_values names {twice[0]} twice; give each class a value of its own")
        return cls({value: index for index, value in enumerate(values)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any], class_names: Sequence[str] | None = None) -> Self:
        """Read what `as_json` or a person wrote: `{"0": "grass", "255": 1, "7": "ignore"}`.

        Args:
            values: Values such as `"7"`, or colours such as `"#ff0000"` or `"[255, 0, 0]"`, to a class' index or name,
                or to `"ignore"` or None.
            class_names: The names that may stand for indices.

        Raises:
            ValueError: If a key is neither value nor colour or stands twice, or a class is unknown.
        """
        found: dict[int | Colour, int | None] = {}
        for text, target in values.items():
            key = _key(text)
            if key in found:
                raise ValueError(f"the label map names {shown(key)} twice")
            found[key] = _target(target, text, list(class_names or ()))
        return cls(found)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], class_names: Sequence[str] | None = None, *, colours: bool = False
    ) -> Self:
        """Read a JSON file, as `from_json` takes it.

        Args:
            path: The file.
            class_names: The names that may stand for indices.
            colours: Whether it must name colours, rather than values.

        Raises:
            DataMissingError: There is no such file.
            OptionError: It is no such JSON; the message names the file.
        """
        if not Path(path).is_file():
            raise DataMissingError(f"there is no {path}, which should be a JSON file of a label map")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
            if not isinstance(values, dict):
                raise ValueError(f'it should hold {{"value": class, ...}}, not a {type(values).__name__}')
            found = cls.from_json(values, class_names)
            if found.is_of_colours != colours:
                kinds = ("colours", "label_colours") if found.is_of_colours else ("values", "label_map")
                raise ValueError(f"it names {kinds[0]}, which {kinds[1]} takes")
        except (ValueError, RecursionError) as error:  # of json and of the encoding, too
            raise OptionError(f"{path} is no label map: {error}") from error
        return found

    @property
    def is_of_colours(self) -> bool:
        """Whether it maps colours, rather than values."""
        return isinstance(next(iter(self.classes)), tuple)

    def as_json(self) -> dict[str, int | None]:
        """The map in JSON values, for `from_json`."""
        return {shown(key): target for key, target in self.classes.items()}

    def ignoring(self, values: Iterable[int]) -> "LabelMap":
        """The map that has further values of "no class".

        Args:
            values: The values.

        Raises:
            ValueError: If one is a class, or the map is of colours.
        """
        added: dict[int | Colour, int | None] = dict.fromkeys(values, None)
        if added and self.is_of_colours:
            raise ValueError("ignore_index names values, and label_colours colours; give the colour null as its class")
        for value in added:
            if self.classes.get(value) is not None:
                raise ValueError(f"ignore_index {value} is class {self.classes[value]} in the label map; leave one out")
        return LabelMap({**self.classes, **added})

    def check(self, num_classes: int) -> None:
        """Refuse a class that there is not.

        Args:
            num_classes: Number of classes K.

        Raises:
            ValueError: If an index is K or more.
        """
        for key, target in self.classes.items():
            if target is not None and target >= num_classes:
                raise ValueError(
                    f"the label map gives {shown(key)} class {target}, but {num_classes} classes are 0 to "
                    f"{num_classes - 1}"
                )

    def read_labels(self, path: str | os.PathLike[str]) -> NDArray[np.integer]:
        """Read what `to_classes` takes of a label file: its values or its colours."""
        return read_label_colours(path) if self.is_of_colours else read_labels(path)

    def to_classes(self, values: NDArray[np.integer], num_classes: int, *, path: object) -> NDArray[np.integer]:
        """Turn what `read_labels` gave into classes, and into `ignored_label` where ignored.

        Args:
            values: Values, or colours as numbers `0xRRGGBB`.
            num_classes: Number of classes K.
            path: The file, for messages.

        Returns:
            uint8, or int16 for more than 255 classes.

        Raises:
            UnknownLabelError: If the map does not name a value.
        """
        ignored = ignored_label(num_classes)
        targets = {_number(key): ignored if target is None else target for key, target in self.classes.items()}
        classes = _look_up(values, targets)
        unknown = classes == _UNKNOWN
        if unknown.any():
            found = np.unique(values[unknown])
            names = [f"#{value:06x}" if self.is_of_colours else str(value) for value in found[:5].tolist()]
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            known = ", ".join(shown(key) for key in list(self.classes)[:10]) + (
                ", ..." if len(self.classes) > 10 else ""
            )
            raise UnknownLabelError(
                f"label {path} holds {', '.join(names)}{more} ({np.count_nonzero(unknown)} pixels), but the label map "
                f"names only {known}; name what is missing, or ignore it"
            )
        return classes.astype(np.uint8 if num_classes <= 255 else np.int16)


def shown(key: int | Colour) -> str:
    """A value or a colour as JSON files have it."""
    return f"#{_number(key):06x}" if isinstance(key, tuple) else str(key)


def _number(key: int | Colour) -> int:
    return (key[0] << 16) | (key[1] << 8) | key[2] if isinstance(key, tuple) else key


def _look_up(values: NDArray[np.integer], targets: Mapping[int, int]) -> NDArray[np.int16]:
    """The target of each value, or `_UNKNOWN`."""
    if values.dtype in (np.uint8, np.uint16):
        table = np.full(np.iinfo(values.dtype).max + 1, _UNKNOWN, np.int16)
        for value, target in targets.items():
            if 0 <= value < len(table):
                table[value] = target
        return table[values]
    known = np.array(sorted(targets), np.int64)
    classes = np.array([targets[value] for value in known.tolist()], np.int16)
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[places] == values, classes[places], np.int16(_UNKNOWN))


def _key(text: str) -> int | Colour:
    """A value `7`, or a colour `#ff0000`, `[255, 0, 0]` or `255,0,0`."""
    if re.fullmatch(r"\s*-?\d+\s*", text):
        return int(text)
    if re.fullmatch(r"\s*#[0-9a-fA-F]{6}\s*", text):
        number = int(text.strip()[1:], 16)
        return number >> 16, number >> 8 & 255, number & 255
    if re.fullmatch(r"\s*[\[(]?\s*\d+\s*,\s*\d+\s*,\s*\d+\s*[\])]?\s*", text):
        red, green, blue = map(int, re.findall(r"\d+", text))
        return red, green, blue
    raise ValueError(f'{text!r} is neither a value such as "7" nor a colour such as "#ff0000" or "[255, 0, 0]"')


def _target(target: Any, text: str, names: list[str]) -> int | None:
    """A class index, or None for ignored."""
    if target is None:
        return None
    if isinstance(target, str):
        if names.count(target) == 1 and target != IGNORE:
            return names.index(target)
        if target == IGNORE and IGNORE not in names:
            return None
        if target == IGNORE:
            raise ValueError(f'{text} is "{IGNORE}", which is a class here; give its index, or null for no class')
        listed = f"the classes are {', '.join(names)}" if names else "classes have no names here, so give indices"
        raise ValueError(f"{text} is {target!r}, but {listed}, or {IGNORE}")
    if isinstance(target, bool) or not isinstance(target, int):
        raise ValueError(f'{text} must be a class index, a name or "{IGNORE}"; got {target!r}')
    return target


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice, of which JSON would keep the last."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"it names {twice[0]} twice")
    return dict(pairs)
