"""Show a model on a page in the browser: drop an image, see its classes, change what the model lets you change.

    segheads demo --model runs/own
    segheads demo --model OWNER/NAME --examples photos --open

The page needs `pip install "segheads[demo]"`, works offline, and is for this machine alone. There is no password and no
public link: `--host 0.0.0.0` lets in all who reach the machine. Uploads lie in a temporary folder, which Ctrl-C removes
as it ends the command.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from accelerate import Accelerator

from segheads.cli.predict import Machine, Views, open_predictor
from segheads.data.folders import walk_images
from segheads.errors import DataMissingError
from segheads.page.server import check_gradio, open_socket, serve
from segheads.page.views import Viewer
from segheads.ranges import Range
from segheads.training.machine import Precision, share_cores


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, and who may reach the page."""

    model: str
    """The folder of a run, a folder that save_pretrained wrote, or a model's name on the Hugging Face hub."""
    host: str = "127.0.0.1"
    """Address of this machine at which the page is: 127.0.0.1 is for this machine alone, 0.0.0.0 for its networks."""
    port: Annotated[int, Range(0, 65535)] = 7860
    """Port of the page; 0 takes any free one."""
    open: bool = False
    """Open the page in a browser."""
    examples: Path | None = None
    """Folder of images to choose from, the first 24 at any depth."""
    max_upload: Annotated[float, Range(0, above=True)] = 20
    """The most that an uploaded file may have, MB (2**20 bytes)."""
    max_pixels: Annotated[int, Range(1)] = 25_000_000
    """The most pixels of an image that is decoded."""
    device: str | None = None
    """Where the model runs, such as cpu or cuda:1; None takes a GPU where there is one."""
    mixed_precision: Precision | None = None
    """Precision of the forward pass; None means fp32."""
    threads: Annotated[int | None, Range(1)] = None
    """CPU threads; None takes all cores."""
    views: Views = Views()
    """The protocol."""


def main(config: Config) -> None:
    """Run the command."""
    check_gradio()
    examples = find_examples(config.examples)
    with open_socket(config.host, config.port) as place:
        accelerator = Accelerator(cpu=config.device == "cpu")
        share_cores(accelerator, config.threads)
        machine = Machine(device=config.device, mixed_precision=config.mixed_precision)
        predictor = open_predictor(config.model, config.views, machine, accelerator)
        serve(
            Viewer(predictor, config.max_pixels),
            place,
            title=config.model,
            examples=examples,
            max_upload=config.max_upload,
            browse=config.open,
        )


def find_examples(folder: Path | None) -> list[Path]:
    """The images of a folder, at any depth.

    Args:
        folder: None has none.

    Raises:
        DataMissingError: There is no such folder, or it has no images.
    """
    if folder is None:
        return []
    found = walk_images(folder) if folder.is_dir() else []
    if not found:
        raise DataMissingError(f"--examples {folder} is no folder with images; give one that has some")
    return found
