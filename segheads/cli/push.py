"""Upload a run's model to the Hugging Face hub, with its card: scores, classes, pictures, terms.

    segheads push runs/own OWNER/NAME --private
    segheads push runs/own OWNER/NAME --branch longer --licence cc-by-nc-4.0
    segheads push models/upernet OWNER/NAME --create-pr

The token is that of `hf auth login`, or HF_TOKEN. What is uploaded: README.md, config.json, model.safetensors and, of a
run, its predictions.jpg and curves.jpg; the first shows images of the validation set, and `--no-pictures` leaves both
out. The model is loaded and its weights are checked before.

README.md in the model's folder (RUN/model) is the card. Edit it as you like: an edited card is uploaded as it is, and
one that was edited on the hub is kept; `--new-card` writes it anew. Its front matter names a licence if you give one.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from segheads.card import write_card_of
from segheads.card.card import CARD
from segheads.card.record import PICTURES
from segheads.cli.evaluate import find_model
from segheads.errors import SavedModelMissingError
from segheads.hub import UPLOAD, check_name, upload
from segheads.model import SegmentationModel
from segheads.saving import CONFIG_FILE, WEIGHTS_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is uploaded, and where to."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL"), tyro.conf.Positional]
    """The folder of a run, or one that save_pretrained wrote."""
    name: Annotated[str, tyro.conf.arg(metavar="OWNER/NAME"), tyro.conf.Positional]
    """The repository, which is made if need be."""
    private: bool = False
    """Make a new repository private, whatever the account's settings; one that is there must be."""
    branch: str | None = None
    """Branch to commit to, made if need be; None means main."""
    create_pr: bool = False
    """Open a pull request instead."""
    message: str = UPLOAD
    """Of the commit."""
    licence: str | None = None
    """Of the weights, in the hub's words, such as mit, cc-by-nc-4.0 or other; None says nothing about it."""
    pictures: bool = True
    """Upload the run's pictures, which show images of the validation set."""
    new_card: bool = False
    """Write README.md anew, here and on the hub, also where it was edited."""


def main(config: Config) -> None:
    """Run the command."""
    check_name(config.name)
    place = Path(config.model)
    if not place.is_dir():
        raise SavedModelMissingError(f"{place} is no folder; give that of a run, or one that save_pretrained wrote")
    if place.name == "model" and (place.parent / "metrics.jsonl").is_file():
        place = place.parent  # of the run, which tells more
    folder = Path(find_model(str(place))[0])
    model = SegmentationModel.from_pretrained(folder)  # refuses what is damaged
    write_card_of(place, folder, model, pictures=config.pictures, new=config.new_card)
    shown = [f"{Path(name).stem}.jpg" for name in PICTURES] if config.pictures else []
    paths = [folder / name for name in (CARD, CONFIG_FILE, WEIGHTS_FILE, *shown)]
    commit = upload(
        {path.name: path for path in paths if path.is_file()},
        config.name,
        message=config.message,
        private=config.private or None,
        branch=config.branch,
        create_pr=config.create_pr,
        new_card=config.new_card,
        metadata={} if config.licence is None else {"license": config.licence},
    )
    log.info("%s\ncommit %s: %s", commit.repo_url, commit.oid, commit.pr_url or commit)
