"""The config.json of a run, as others than the training read it: what it says of data and of windows, checked."""

from pathlib import Path
from typing import Any, Optional

from typing_extensions import get_type_hints

from segheads.data.config import DataConfig
from segheads.errors import RunError
from segheads.files import read_json
from segheads.inference.protocol import InferenceProtocol, Size
from segheads.schema import check_value

OF_A_RUN: dict[str, Any] = {"seed": int, "crop_size": Size}


def read_run_config(folder: str | Path) -> dict[str, Any]:
    """Read what a run was started with; a folder without config.json gives nothing.

    Args:
        folder: The run's.

    Raises:
        RunError: The file is damaged, or an entry is of another kind or out of range; the message names both.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    values: dict[str, Any] = read_json(path, "the configuration of a run", RunError)
    hints = {**get_type_hints(DataConfig), **get_type_hints(InferenceProtocol), **OF_A_RUN}
    try:
        for name in hints.keys() & values.keys():
            check_value(values[name], Optional[hints[name]], name)  # noqa: UP045 (a hint that is a value)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    return values
