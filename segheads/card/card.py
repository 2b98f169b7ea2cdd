"""A card as a file, and on its way to the hub.

It ends with a stamp, the hash of its text: a card that a person edited is told by that, and not overwritten.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from segheads.card.record import SCORES, Record, read_record
from segheads.card.sections import NAME, SECTIONS, parts
from segheads.data import DATASETS
from segheads.files import whole_file, write_text

if TYPE_CHECKING:
    from segheads.model import SegmentationModel

CARD = "README.md"
STAMP = re.compile(r"<!-- segheads card (\w+) -->\s*\Z")
OF_THE_MIXIN = "This model has been pushed to the Hub using the [PytorchModelHubMixin]"  # what 0.1.0 wrote
PIXELS, QUALITY = 1600, 85  # longest side and JPEG quality of pictures
NOTHING = Record()
log = logging.getLogger(__name__)


def model_card(model: "SegmentationModel", record: Record = NOTHING, **metadata: Any) -> ModelCard:
    """The card of a model.

    Text that users chose, such as names of classes, is escaped; of paths from the machine's root on only the last part
    is told.

    Args:
        model: The model.
        record: What else is known of it.
        **metadata: Further fields of the front matter, such as `license="mit"`.

    Examples:
        >>> from segheads import create_model
        >>> card = model_card(create_model("test_vit", "linear", 3, pretrained=False), license="mit")
        >>> card.data.pipeline_tag, card.data.license
        ('image-segmentation', 'mit')
    """
    text = "\n\n".join(filter(None, (section(model, record) for section in SECTIONS)))
    data = ModelCardData(**{**_metadata(model, record), **metadata})
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_card_of(
    place: Path, folder: Path, model: "SegmentationModel", *, pictures: bool = True, new: bool = False
) -> None:
    """Write the card of a saved model, and small pictures beside it, from what its run or an evaluation left.

    Where nothing was measured, a card that is there stays. Whatever goes wrong is a warning.

    Args:
        place: The folder of the run, or of the model.
        folder: The folder of the model.
        model: The model.
        pictures: Show those of the run.
        new: Overwrite a card that was edited, too.
    """
    with card_or_warning(folder):
        record = read_record(place)
        record = record if pictures else record._replace(pictures=())
        if record.scores or new or not (folder / CARD).is_file():
            card = model_card(model, record)
            for path in record.pictures:
                with whole_file(folder / f"{path.stem}.jpg") as temporary, Image.open(path) as picture:
                    picture.thumbnail((PIXELS, PIXELS))
                    picture.convert("RGB").save(temporary, quality=QUALITY)
            save_card(card, folder, new=new)


def save_card(card: ModelCard, folder: Path, *, new: bool = False) -> None:
    """Write a card into a model's folder, unless one is there that was edited.

    Args:
        card: The card.
        folder: The folder.
        new: Overwrite that, too.
    """
    path = folder / CARD
    if not new and path.is_file() and is_edited(path.read_text(encoding="utf-8", errors="replace")):
        log.info("%s was edited and is kept", path)
    else:
        write_text(path, _stamped(str(card)))


def keep_card(folder: Path, new: Path) -> None:
    """Copy a card that was edited into the folder that will take the place of its own.

    Args:
        folder: Of the model, which may be missing.
        new: The other folder.
    """
    path = folder / CARD
    if path.is_file() and is_edited(path.read_text(encoding="utf-8", errors="replace")):
        shutil.copy(path, new / CARD)


@contextmanager
def card_or_warning(folder: Path) -> Iterator[None]:
    """Say of a card that cannot be made, whatever the reason, that it is missing, and go on.

    Args:
        folder: Of the model.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s is not written: %s", folder / CARD, " ".join(str(error).split()) or repr(error))


def is_edited(text: str) -> bool:
    """Whether a person had a hand in a card.

    Args:
        text: The card; an empty one is nobody's.
    """
    if (stamp := STAMP.search(text)) is None:
        return bool(text.strip()) and OF_THE_MIXIN not in text
    return stamp[1] != _digest(text[: stamp.start()])


def addressed(text: str, name: str, metadata: Mapping[str, Any]) -> str:
    """A card with the name of its repository and further fields of its front matter; one that was edited stays so.

    Args:
        text: The card.
        name: `OWNER/NAME`.
        metadata: Fields, such as `{"license": "mit"}`.
    """
    edited = is_edited(text)
    if edited and not metadata:
        return text.replace(NAME, name)
    card = ModelCard(STAMP.sub("", text).replace(NAME, name), ignore_metadata_errors=True)
    if not edited and card.data.get("eval_results"):
        card.data["model_name"] = name.rpartition("/")[2]
    for key, value in metadata.items():
        card.data[key] = value
    return str(card) if edited else _stamped(str(card))


def _stamped(text: str) -> str:
    text = f"{text.rstrip()}\n\n"
    return f"{text}<!-- segheads card {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]  # whatever ends a line


def _metadata(model: "SegmentationModel", record: Record) -> dict[str, Any]:
    """The front matter; a licence is for the weights' author to give."""
    kind, began_from = DATASETS.get(record.dataset or ""), record.origin(model.backbone)[1]
    values: dict[str, Any] = {
        "library_name": "segheads",
        "pipeline_tag": "image-segmentation",
        "tags": ["segheads", "semantic-segmentation", "timm", "model_hub_mixin"],
    }
    if began_from:
        values |= {"base_model": began_from, "base_model_relation": "finetune"}
    if kind is not None and kind.hub_id:
        values["datasets"] = [kind.hub_id]
    if record.scores:
        values |= {"metrics": [SCORES[key] for key in record.scores], "eval_results": _eval_results(record)}
        values["model_name"] = "-on-".join(parts(model))
    return values


def _eval_results(record: Record) -> list[EvalResult]:
    """The scores as the hub lists them."""
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="semantic segmentation",
            dataset_type=record.dataset or "other",
            dataset_name=record.data,
            dataset_split=record.split,
            metric_type=SCORES[key],
            metric_name=key,
            metric_value=round(value, 4),
        )
        for key, value in record.scores.items()
    ]
