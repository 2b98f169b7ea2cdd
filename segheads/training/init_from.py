"""The weights of a saved model as the start of another run."""

import logging
from pathlib import Path

from segheads.classes import Classes
from segheads.errors import SavedModelError
from segheads.model import SegmentationModel
from segheads.saving import find_folder
from segheads.weights_file import load_weights

log = logging.getLogger(__name__)


def init_from(model: SegmentationModel, place: str, classes: Classes) -> str:
    """Load the weights of a saved model of the same parts; for other classes what depends on them stays as it is.

    Settings, such as bandwidths, stay the model's own.

    Args:
        model: A model from `create_model`.
        place: The folder of a run, a folder that `save_pretrained` wrote, or a name on the hub, `OWNER/NAME` or
            `OWNER/NAME@REVISION`.
        classes: What the model is to tell apart.

    Returns:
        Where the weights are from; of a model on the hub with the commit, `OWNER/NAME@COMMIT`.

    Raises:
        SavedModelMissingError: If there is no such model.
        SavedModelError: If it is damaged, or of other parts than the model.
    """
    folder = Path(place) / "model"
    saved = find_folder(str(folder if folder.is_dir() else place))
    count = saved.plan.num_classes
    named_so = saved.classes is None or saved.classes.names == classes.names
    same = count == model.num_classes and named_so
    new = [] if same else model.weights_of_classes()
    try:
        load_weights(model, saved.weights, new=new)
    except SavedModelError as error:
        raise SavedModelError(
            f"{error}; it is a {saved.plan.head} on {saved.plan.backbone}: choose the same backbone, head and sizes"
        ) from error
    if same:
        named = "the same classes" if saved.classes is not None else f"{count} classes without names, taken as the same"
        log.info("weights from %s, of %s", place, named)
    else:
        log.info("weights from %s, of %d other classes; new and random: %s", place, count, ", ".join(new))
    return place if saved.revision is None else f"{place.rpartition('@')[0] or place}@{saved.revision}"
