"""Which heads leave for which format on which backbones, at any size: one table.

    python recipes/benchmark/export_table.py
    python recipes/benchmark/export_table.py --heads linear uper --backbones vit swin --formats onnx openvino

Models are narrow and of random weights. Each is exported as `segheads.export` does, which compares the file with the
model at three sizes. Rows that are in the JSON of `--output` stay there, and are not made again without `--again`.
ONNX takes about ten seconds of one core, for SenFormer a minute; aoti as long as its C++ compiler.
"""

import json
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from segheads import SegmentationModel, create_model, export, list_heads
from segheads.cli.run import run
from segheads.errors import OptionError, SegheadsError
from segheads.evaluation.tables import markdown_table
from segheads.exporting import FORMATS
from segheads.files import write_json, write_text

SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
DINO = {"embed_dim": 64, "depth": 4, "num_heads": 2}  # registers and rotary positions
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("test_vit", {}),
    "dinov3": ("vit_small_patch16_dinov3", DINO),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "efficientnet": ("test_efficientnet", {}),
}
# Six equal layers are translated as one is, only slower.
ONE_LAYER: dict[str, dict[str, Any]] = {
    "class_attention": {"num_layers": 1},
    "feature_fusion": {"decoder_kwargs": {"num_layers": 1}},
}
ONE_LAYER["senformer"] = {"learner_kwargs": {"num_layers": 1}}
NARROW = {"senformer", "feature_fusion"}  # their pyramid is made narrow
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """What to try."""

    heads: tuple[str, ...] = field(default_factory=lambda: tuple(list_heads()))
    backbones: tuple[str, ...] = tuple(BACKBONES)
    formats: tuple[str, ...] = tuple(FORMATS)
    output: Path = Path("runs/export")
    """Folder of export.json and export.md."""
    again: bool = False
    """Make rows that are there already, too."""


def main(config: Config) -> None:
    """Try all, and write table and JSON after each."""
    for kind, names, known in (("formats", config.formats, FORMATS), ("backbones", config.backbones, BACKBONES)):
        if unknown := [name for name in names if name not in known]:
            raise OptionError(f"{kind} must be of {', '.join(known)}; got {', '.join(unknown)}")
    file = config.output / "export.json"
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for format in config.formats:
        for backbone in config.backbones:
            for head in config.heads:
                key = f"{format} {backbone} {head}"
                if key in found and not config.again:
                    continue
                start = time.process_time()
                found[key] = attempt(head, backbone, format)
                print(f"{key}: {found[key]} ({time.process_time() - start:.0f} s)", flush=True)
                write_json(file, found)
    write_text(config.output / "export.md", table(found))
    print(table(found))


def attempt(head: str, backbone: str, format: str) -> str:
    """`ok`, or why not."""
    try:
        model = narrow_model(head, backbone)
    except ValueError as error:
        return f"no such model: {str(error).splitlines()[0]}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = export(model, Path(folder) / f"model{FORMATS[format].suffix}", format=format)
        except (SegheadsError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "ok" if done.size is None else f"fixed: {done.reason}"


def narrow_model(head: str, backbone: str) -> SegmentationModel:
    """A small model whose labels differ from place to place."""
    name, options = BACKBONES[backbone]
    torch.manual_seed(0)
    model = create_model(
        name,
        head,
        7,
        pretrained=False,
        backbone_kwargs={"model_kwargs": options} if options else {},
        head_kwargs=ONE_LAYER.get(head, {}),
        pyramid_kwargs={"out_channels": 32} if head in NARROW else {},
    )
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def table(found: dict[str, str]) -> str:
    """A row for each head and format, a column for each backbone, and what is not ok below it."""
    cells = {tuple(key.split(" ", 2)): what for key, what in found.items()}
    backbones = [name for name in BACKBONES if any(key[1] == name for key in cells)]
    rows = [
        [head, format, *(cells.get((format, backbone, head), "").partition(":")[0] for backbone in backbones)]
        for format, head in dict.fromkeys((format, head) for format, _, head in cells)
    ]
    others = [f"- {key}: {what}" for key, what in found.items() if what != "ok"]
    return "\n".join([markdown_table(["head", "format", *backbones], rows), "", *others]) + "\n"


if __name__ == "__main__":
    run(main, Config, description=__doc__)
