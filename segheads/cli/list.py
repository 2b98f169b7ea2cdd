"""List what there is of a kind, by name: heads, backbones, data sets, losses and the rest.

segheads list heads
segheads list backbones "convnext*" --pretrained
segheads list losses --json
"""

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args

import timm
import tyro

from segheads.data import DATASETS
from segheads.errors import OptionError
from segheads.functional import KERNELS
from segheads.heads.registry import DECODERS, HEADS
from segheads.losses import LOSSES
from segheads.merges import MERGES
from segheads.metrics import METRICS
from segheads.pyramids import PYRAMIDS

Kind = Literal["heads", "backbones", "datasets", "losses", "merges", "kernels", "metrics", "pyramids"]
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "datasets": DATASETS,
    "losses": LOSSES,
    "merges": MERGES,
    "kernels": KERNELS,
    "metrics": METRICS,
    "pyramids": PYRAMIDS,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is listed."""

    kind: Annotated[Kind, tyro.conf.Positional]
    """Of what."""
    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Names that fit, with * and ? as in a shell; in quotes."""
    pretrained: bool = False
    """Of backbones, those whose weights timm has, each with its tag and licence."""
    json: bool = False
    """Print JSON, for programs."""


def main(config: Config) -> None:
    """Run the command."""
    found = find(config.kind, config.pattern, pretrained=config.pretrained)
    if config.json:
        print(json.dumps([{"name": name, "description": text} for name, text in found.items()]))
        return
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in found.items()))


def find(kind: Kind, pattern: str = "*", *, pretrained: bool = False) -> dict[str, str]:
    """Names that fit, with a line on each.

    Args:
        kind: Of what.
        pattern: Of names, as a shell has it.
        pretrained: Of backbones, those with weights.

    Raises:
        OptionError: There is no such kind, no name fits, or `pretrained` is asked of another kind.
    """
    if kind not in get_args(Kind):
        raise OptionError(f"there is no kind {kind!r}; known: {', '.join(get_args(Kind))}")
    if pretrained and kind != "backbones":
        raise OptionError(f"--pretrained is of backbones; got {kind}")
    everything = _backbones(pretrained) if kind == "backbones" else {name: _line(x) for name, x in _parts(kind).items()}
    found = {name: text for name, text in everything.items() if fnmatchcase(name.lower(), pattern.lower())}
    if not found:
        close = difflib.get_close_matches(pattern, everything, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f'; a part of a name needs stars: "*{pattern}*"'
        raise OptionError(f"none of {len(everything)} {kind} is called {pattern!r}{hint}")
    return found


def _parts(kind: Kind) -> Mapping[str, Any]:
    return {**HEADS, **DECODERS} if kind == "heads" else REGISTRIES[kind]


def _line(part: Any) -> str:
    """The first sentence of what a part says of itself."""
    if decoder := getattr(part, "decoder", None):
        return f"Decoder {decoder!r} of segmentation-models-pytorch, on any backbone."
    described = part if isinstance(part, type) or inspect.isfunction(part) else getattr(part, "func", type(part))
    return (inspect.getdoc(described) or "").partition("\n")[0]


def _backbones(pretrained: bool) -> dict[str, str]:
    names: Callable[..., list[str]] = timm.list_pretrained if pretrained else timm.list_models
    return {name: _licence(name) if pretrained else "" for name in names()}


def _licence(name: str) -> str:
    known = timm.get_pretrained_cfg(name)
    return f"licence {(known.license if known else None) or 'not told'}"
