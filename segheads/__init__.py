"""Interchangeable semantic-segmentation heads that attach to any timm backbone.

Each name loads its module when it is first asked for. Whatever `segheads.heads` exports is here, too.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from segheads.version import VERSION

if TYPE_CHECKING:
    from segheads.backbones import TimmBackbone as TimmBackbone
    from segheads.build import create_model as create_model
    from segheads.convert import from_reference as from_reference
    from segheads.errors import PretrainedWeightsError as PretrainedWeightsError
    from segheads.exporting import export as export
    from segheads.heads import *  # noqa: F403 (one list of heads is enough)
    from segheads.mean_shift import MeanShift as MeanShift
    from segheads.metrics.boundary import BoundaryIoU as BoundaryIoU
    from segheads.metrics.confusion import SegmentationMetrics as SegmentationMetrics
    from segheads.metrics.object_size import ObjectSizeIoU as ObjectSizeIoU
    from segheads.model import SegmentationModel as SegmentationModel
    from segheads.prediction import Prediction as Prediction
    from segheads.predictor import Predictor as Predictor
    from segheads.pyramids import FPN as FPN
    from segheads.pyramids import FPNT as FPNT
    from segheads.pyramids import SimplePyramid as SimplePyramid

__version__ = VERSION

_MODULES = {  # the same for running code; all other public names are those of segheads.heads
    "FPN": "pyramids",
    "FPNT": "pyramids",
    "BoundaryIoU": "metrics.boundary",
    "MeanShift": "mean_shift",
    "ObjectSizeIoU": "metrics.object_size",
    "Prediction": "prediction",
    "Predictor": "predictor",
    "PretrainedWeightsError": "errors",
    "SegmentationMetrics": "metrics.confusion",
    "SegmentationModel": "model",
    "SimplePyramid": "pyramids",
    "TimmBackbone": "backbones",
    "create_model": "build",
    "export": "exporting",
    "from_reference": "convert",
}


if not TYPE_CHECKING:  # which would pass over names that are not there

    def __getattr__(name: str) -> Any:
        """Load a public name, or a module of the package."""
        if name == "__all__":
            return __dir__()
        if not name.startswith("_"):
            if name in _MODULES:
                return _kept(name, getattr(import_module(f"segheads.{_MODULES[name]}"), name))
            if find_spec(f"segheads.{name}") is not None:
                return import_module(f"segheads.{name}")
            heads = import_module("segheads.heads")
            if name in heads.__all__:
                return _kept(name, getattr(heads, name))
        raise AttributeError(f"module 'segheads' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """The public names."""
        return sorted({*_MODULES, *import_module("segheads.heads").__all__})


def _kept(name: str, value: Any) -> Any:
    """The value, which is not asked for again."""
    globals()[name] = value
    return value
