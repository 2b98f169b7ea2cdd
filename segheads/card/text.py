"""Markdown of text that users chose: it shows as they wrote it, and does nothing."""

import html
import re
from collections.abc import Sequence
from typing import Any

DASH = "–"
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # controls, changes of direction
SPECIAL = re.compile(r"[\\`*_\[\]|$~#]")
PLACE = re.compile(r"(?P<start>(?:^|=))(?:file:)?(?:~\w*|[A-Za-z]:)?[\\/].*$", re.DOTALL)
WITHIN = re.compile(r"(?<![\w.])(?:file:)?(?:~\w*|[A-Za-z]:)?[\\/][^\s\"',;)\]]*")


def escaped(text: str) -> str:
    r"""Text in a line of Markdown, or in a cell of a table.

    Args:
        text: Any.

    Examples:
        >>> print(escaped("a|b <i> $c$"))
        a\|b &lt;i&gt; \$c\$
    """
    line = " ".join(UNSEEN.sub(" ", text).split())
    return SPECIAL.sub(r"\\\g<0>", html.escape(line, quote=False))


def code(text: str) -> str:
    """A name set as code.

    Args:
        text: Any.
    """
    return "`" + " ".join(UNSEEN.sub(" ", text).replace("`", "'").split()) + "`"


def fence(lines: Sequence[str], language: str = "") -> str:
    """A block of code, which no line of it ends.

    Args:
        lines: The code.
        language: For colours.
    """
    text = "\n".join(UNSEEN.sub(" ", line) for line in lines)
    marks = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{marks}{language}\n{text}\n{marks}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table of cells that are Markdown.

    Args:
        head: What stands above the columns.
        rows: The cells of each row.
        left: How many columns, from the first on, are set left; the others, of numbers, are set right.
    """
    line = "|" + "---|" * left + "--:|" * (len(head) - left)
    return "\n".join([_line(head), line, *map(_line, rows)])


def percent(value: Any) -> str:
    """Two digits after the point, or a dash for what is no number.

    Args:
        value: A fraction.
    """
    return f"{100 * value:.2f}" if is_number(value) else DASH


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number.

    Args:
        value: Any.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def words(value: Any) -> str:
    """A value of an option as a person writes it.

    Args:
        value: Of JSON.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " x ".join(map(str, value)) if isinstance(value, (list, tuple)) and len(value) == 2 else _listed(value)


def placeless(word: str) -> str:
    """A word of a command line, of whose paths from the machine's root on only the last part is left.

    Args:
        word: Any.

    Examples:
        >>> placeless("/home/me/data/camvid"), placeless("--output=/home/me/my runs/one"), placeless("data/camvid")
        ('camvid', '--output=one', 'data/camvid')
    """
    if match := PLACE.search(word):
        return word[: match.end("start")] + _last(match[0])
    return WITHIN.sub(lambda match: _last(match[0]), word)


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
