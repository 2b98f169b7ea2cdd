"""What of a trained model may be changed for one image: mean shift, learners and their merge, the threshold."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from segheads.errors import OptionError, options_become_parts
from segheads.heads import SenFormerHead
from segheads.mean_shift import MeanShift
from segheads.merges import MERGES
from segheads.model import SegmentationModel
from segheads.predictor import Predictor

MOST_LAYERS = 8  # of a mean shift, or twice the model's own
BANDWIDTHS = (0.1, 4.0)  # the smallest and the largest, times the model's own
THRESHOLDS = (0.01, 0.99)


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What there is to change in a model, and what it is set to; None, or nothing, where it has no such part.

    Attributes:
        layers: How often tokens are shifted, of several mean shifts the most.
        bandwidths: Of each mean shift, in units of its projected tokens.
        levels: Levels whose learners vote, 0 the finest.
        built_levels: Levels that have learners.
        merge: How learners become one prediction.
        merges: The merges that need no training, and the model's own.
        num_learners: How many can disagree.
        threshold: Of a model of one class, the probability above which a pixel is of it.
    """

    layers: int | None = None
    bandwidths: tuple[float, ...] = ()
    levels: tuple[int, ...] = ()
    built_levels: tuple[int, ...] = ()
    merge: str | None = None
    merges: tuple[str, ...] = ()
    num_learners: int = 0
    threshold: float | None = None

    @property
    def most_layers(self) -> int:
        """The most shifts that may be chosen."""
        return max(MOST_LAYERS, 2 * (self.layers or 0))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is chosen for one image; None leaves the model's own.

    Attributes:
        layers: How often to shift.
        bandwidth: Factor of the bandwidths of all mean shifts.
        levels: Levels whose learners vote.
        merge: A merge.
        threshold: Above 0 and below 1.
    """

    layers: int | None = None
    bandwidth: float | None = None
    levels: tuple[int, ...] | None = None
    merge: str | None = None
    threshold: float | None = None


def find_controls(predictor: Predictor) -> Controls:
    """What there is to change in a predictor's model.

    Args:
        predictor: Its model keeps all settings.
    """
    model = predictor.model
    shifts, ensemble = _shifts(model), _ensemble(model)
    levels: tuple[int, ...] = ()
    built: tuple[int, ...] = ()
    if ensemble is not None:
        levels = tuple(ensemble.levels)
        with _restored(model):
            ensemble.levels = None
            built = tuple(ensemble.levels)
    own = None if ensemble is None else ensemble.merge
    return Controls(
        layers=max((shift.num_layers for shift in shifts), default=None),
        bandwidths=tuple(shift.bandwidth for shift in shifts),
        levels=levels,
        built_levels=built,
        merge=own,
        merges=() if own is None else tuple(x for x, m in MERGES.items() if x == own or not isinstance(m, type)),
        num_learners=0 if ensemble is None else len(ensemble.learners),
        threshold=predictor.protocol.threshold if model.num_classes == 1 else None,
    )


def choose(controls: Controls, values: Mapping[str, Any]) -> Choice:
    """What was set on the page; whoever reaches it may send anything.

    Args:
        controls: What there is.
        values: JSON values by the names of `Choice`; the model's own of them, and None, change nothing.

    Raises:
        OptionError: Names the control, what it takes and what came.

    Examples:
        >>> choose(Controls(layers=1, bandwidths=(2.0,)), {"layers": 3, "bandwidth": 1})
        Choice(layers=3, bandwidth=None, levels=None, merge=None, threshold=None)
    """
    try:
        layers, bandwidth, threshold = (values.get(name) for name in ("layers", "bandwidth", "threshold"))
        levels = values.get("levels")
        choice = Choice(
            layers=None if layers in (None, controls.layers) else int(layers),
            bandwidth=None if bandwidth in (None, 1) else float(bandwidth),
            levels=None if levels is None else tuple(sorted(int(level) for level in levels)),
            merge=values.get("merge"),
            threshold=None if threshold is None else float(threshold),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError(f"a setting is of another kind than the page sends: {error}") from error
    check_choice(choice, controls)
    return choice


def check_choice(choice: Choice, controls: Controls) -> None:
    """Refuse what the page does not offer.

    Args:
        choice: What came.
        controls: What there is.

    Raises:
        OptionError: Names the control, what it takes and what came.
    """
    layers, low_high = (0, controls.most_layers), "{} must be {:g} to {:g}; got {}"
    for name, value, (low, high) in (
        ("mean shift layers", choice.layers, layers),
        ("bandwidth", choice.bandwidth, BANDWIDTHS),
        ("threshold", choice.threshold, THRESHOLDS),
    ):
        if value is not None and not low <= value <= high:
            raise OptionError(low_high.format(name, low, high, value))
    if choice.levels is not None and not (choice.levels and set(choice.levels) <= set(controls.built_levels)):
        raise OptionError(f"choose one learner or more of the levels {list(controls.built_levels)}")
    if choice.merge is not None and choice.merge not in controls.merges:
        raise OptionError(f"merge must be one of {', '.join(controls.merges)}; got {choice.merge}")


@contextmanager
def changed(model: SegmentationModel, choice: Choice) -> Iterator[None]:
    """A model with what is chosen; afterwards every setting is what it was, to the last bit, also after an error.

    Args:
        model: Nobody else may use it meanwhile.
        choice: The threshold is the protocol's, not the model's.

    Raises:
        OptionError: If settings do not go together, such as a product of one learner.
    """
    with _restored(model), options_become_parts():
        for shift in _shifts(model):
            if choice.layers is not None:
                shift.num_layers = choice.layers
            if choice.bandwidth is not None:
                shift.bandwidth = shift.bandwidth * choice.bandwidth
        ensemble = _ensemble(model)
        if ensemble is not None:
            _vote(ensemble, choice.merge or ensemble.merge, choice.levels or ensemble.levels)
        yield


@contextmanager
def _restored(model: SegmentationModel) -> Iterator[None]:
    with ExitStack() as stack:
        for shift in _shifts(model):
            stack.callback(setattr, shift, "num_layers", shift.num_layers)
            if shift.log_bandwidth is None:
                stack.callback(setattr, shift, "bandwidth", shift.bandwidth)
            else:  # exp and log would lose the last bit
                stack.callback(_put, shift.log_bandwidth, shift.log_bandwidth.detach().clone())
        ensemble = _ensemble(model)
        if ensemble is not None:
            stack.callback(_vote, ensemble, ensemble.merge, ensemble.levels)
        yield


def _vote(ensemble: SenFormerHead, merge: str, levels: list[int] | tuple[int, ...]) -> None:
    ensemble.levels = None  # all: with them every merge may be set
    ensemble.merge = merge
    ensemble.levels = list(levels)


@torch.no_grad()
def _put(weight: torch.Tensor, value: torch.Tensor) -> None:
    weight.copy_(value)


def _shifts(model: SegmentationModel) -> list[MeanShift]:
    """The mean shifts that were trained: one that was built with 0 layers has random weights."""
    blocks = (module for module in model.head.modules() if isinstance(module, MeanShift))
    return [shift for shift in blocks if shift.projection.weight.requires_grad]


def _ensemble(model: SegmentationModel) -> SenFormerHead | None:
    return next((module for module in model.head.modules() if isinstance(module, SenFormerHead)), None)
