"""The classes of a data set or of a model: names and colours."""

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

SHOWN = 3  # differences in a message
Pairs = tuple[tuple[int, int], ...]
Palette = tuple[tuple[int, int, int], ...]
BACKGROUND = "background"


@dataclass(frozen=True)
class Classes:
    """Names of the classes, in the order of their labels, and a colour for each.

    Args:
        names: One name per class.
        palette: One RGB colour (0 to 255) per class; empty for distinct colours.
        flip_pairs: Pairs of classes, by index, that become each other in the mirror, such as a left and a right arm.
        has_background: Whether class 0 is what is none of the others; `Prediction.overlay` leaves it unpainted.

    Raises:
        ValueError: If there are no names, not one colour for each, or pairs that are not of two classes of their own.

    Examples:
        >>> classes = Classes(("road", "sky"))
        >>> len(classes), classes.palette
        (2, ((229, 57, 57), (57, 107, 229)))
    """

    names: tuple[str, ...]
    palette: Palette = ()
    flip_pairs: Pairs = ()
    has_background: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        palette = tuple((int(r), int(g), int(b)) for r, g, b in self.palette) or distinct_colours(len(self.names))
        object.__setattr__(self, "palette", palette)
        if not self.names:
            raise ValueError("classes need one name or more; got none")
        if len(self.names) != len(self.palette):
            raise ValueError(
                f"{len(self.names)} class names came with {len(self.palette)} colours; give one colour per class"
            )

        pairs = tuple((int(a), int(b)) for a, b in self.flip_pairs)
        object.__setattr__(self, "flip_pairs", pairs)
        members = [index for pair in pairs for index in pair]
        if len(set(members)) < len(members) or not all(0 <= index < len(self.names) for index in members):
            raise ValueError(
                f"flip_pairs must be pairs of {len(self.names)} classes, each in one pair at most; got {pairs}"
            )

    def with_flip_pairs(self, names: Sequence[str]) -> "Classes":
        """The same classes, of which some become each other in the mirror.

        Args:
            names: Two names for each pair, one pair after the other.

        Raises:
            ValueError: If a name is unknown, or not in one pair.

        Examples:
            >>> Classes(("sky", "left arm", "right arm")).with_flip_pairs(["left arm", "right arm"]).flip_pairs
            ((1, 2),)
        """
        unknown = [name for name in names if name not in self.names]
        if unknown or len(names) % 2:
            wrong = f"no class is called {unknown[0]!r}" if unknown else f"got {len(names)} names"
            raise ValueError(f"flip_pairs takes two names of classes for each pair; {wrong}")
        indices = [self.names.index(name) for name in names]
        return replace(self, flip_pairs=tuple(zip(indices[::2], indices[1::2], strict=True)))

    @property
    def sides(self) -> tuple[str, ...]:
        """The names that speak of left or right and are in no pair."""
        paired = {index for pair in self.flip_pairs for index in pair}
        return tuple(
            name
            for index, name in enumerate(self.names)
            if index not in paired and {"left", "right"} & set(re.split("[^a-z]+", name.lower()))
        )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def numbered(cls, num_classes: int) -> "Classes":
        """Classes without names of their own: `class 0`, `class 1`, ...; of a single class, it and its background.

        Args:
            num_classes: Number of classes K of a model.

        Examples:
            >>> Classes.numbered(1).names
            ('class 0', 'class 1')
        """
        names = tuple(f"class {index}" for index in range(num_labels(num_classes)))
        return cls(names) if num_classes > 1 else cls.binary(names[1], background=names[0])

    @classmethod
    def binary(
        cls, name: str, colour: tuple[int, int, int] | None = None, *, background: str = BACKGROUND
    ) -> "Classes":
        """One class and its background, labels 1 and 0: what a model with `num_classes=1` tells apart.

        Args:
            name: Of the class.
            colour: Of the class; the background is black.
            background: Name of what is not of the class.

        Raises:
            ValueError: If both have the same name.

        Examples:
            >>> Classes.binary("building")
            Classes(names=('background', 'building'), palette=((0, 0, 0), (229, 57, 57)), flip_pairs=(),
                    has_background=True)
        """
        if name == background:
            raise ValueError(f"a single class needs a name other than {background!r}, which is that of label 0")
        return cls((background, name), ((0, 0, 0), colour or distinct_colours(1)[0]), has_background=True)


def check_names(own: Classes, others: Classes) -> None:
    """Refuse labels that mean something else to a model than to a data set; numbers alone mean whatever they are given.

    Args:
        own: The model's classes.
        others: As many classes of a data set.

    Raises:
        ValueError: If names differ, or come in another order.

    Examples:
        >>> check_names(Classes(("road", "sky")), Classes(("sky", "road")))
        Traceback (most recent call last):
        ValueError: the model and the data set have the same classes in another order: 0 is road in the model and sky
        in the data set, 1 is sky in the model and road in the data set; give the names in the model's order
    """
    numbered = Classes.numbered(len(own)).names
    if own.names == others.names or numbered in (own.names, others.names):
        return
    pairs = enumerate(zip(own.names, others.names, strict=True))
    found = [f"{k} is {a} in the model and {b} in the data set" for k, (a, b) in pairs if a != b]
    shown = ", ".join(found[:SHOWN]) + (f", and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    if sorted(own.names) == sorted(others.names):
        raise ValueError(
            f"the model and the data set have the same classes in another order: {shown}; give the names in the "
            "model's order"
        )
    raise ValueError(f"the model and the data set have other classes: {shown}; give the data set it was trained on")


def ignored_label(num_classes: int) -> int:
    """The label of "no class" in what data sets return: 255 in 8 bit, or -1 in 16 bit where 255 is a class.

    Args:
        num_classes: Number of classes K.

    Examples:
        >>> ignored_label(150), ignored_label(847)
        (255, -1)
    """
    return 255 if num_classes <= 255 else -1


def check_ignore_index(ignore_index: int, num_classes: int) -> None:
    """Refuse an ignored label that is a class: its pixels would be neither learned nor measured.

    Args:
        ignore_index: The label that is left out.
        num_classes: Number of classes K.

    Raises:
        ValueError: If it is one of 0 to K - 1.

    Examples:
        >>> check_ignore_index(255, 847)
        Traceback (most recent call last):
        ValueError: ignore_index 255 is one of the 847 classes 0 to 846, which would be neither learned nor ...
    """
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is one of the {num_classes} classes 0 to {num_classes - 1}, which would be "
            f"neither learned nor measured; give ignore_index=-1, or {num_classes} or more"
        )


def num_labels(num_classes: int) -> int:
    """How many labels a model's label maps have: of a single class, 0 for the background and 1 for the class.

    A model of one class gives one logit for each pixel, whose sigmoid is the probability of the class.

    Args:
        num_classes: Number of classes K, that is of logits.

    Examples:
        >>> num_labels(150), num_labels(1)
        (150, 2)
    """
    return max(num_classes, 2)


def check_several_classes(num_classes: int) -> None:
    """Refuse one class where scores go through a softmax, which makes the probability of a single class 1 everywhere.

    Args:
        num_classes: Number of classes K.

    Raises:
        ValueError: If it is 1.
    """
    if num_classes == 1:
        raise ValueError(
            "num_classes 1 leaves nothing to learn: the softmax of one score is 1 at every pixel; give two classes, "
            "the first of them background, with labels 0 and 1, or loss 'bce', the sigmoid of one score with these "
            "labels"
        )


def distinct_colours(num_classes: int) -> Palette:
    """Return one RGB colour per class, neighbours far apart in hue.

    Args:
        num_classes: How many colours.

    Examples:
        >>> distinct_colours(2)
        ((229, 57, 57), (57, 107, 229))
    """
    colours = []
    for index in range(num_classes):
        hue = index * 0.61803398875 % 1.0  # golden ratio: every next hue falls into the widest gap
        saturation, value = (0.75, 0.5, 0.95)[index // 7 % 3], (0.9, 0.65, 0.45)[index // 21 % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours.append((int(red * 255), int(green * 255), int(blue * 255)))
    return tuple(colours)
