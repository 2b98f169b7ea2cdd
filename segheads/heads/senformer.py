"""SenFormer: a head made of heads, one learner for each level, whose predictions are merged."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from segheads.classes import num_labels
from segheads.functional import upsample
from segheads.functional.binary import with_background, without_background
from segheads.heads.base import Head
from segheads.heads.registry import find_head
from segheads.mean_shift import MeanShift, ShiftOptions
from segheads.merges import MERGES, check_count

Share = Literal["none", "decoder", "class_embeddings"]


class SenFormerHead(Head):
    """One learner per level of a pyramid, each any single-level head; their predictions are merged.

    SenFormer (Bousselham et al., BMVC 2022, https://arxiv.org/abs/2111.13280;
    https://github.com/WalBouss/SenFormer), whose learners are class-attention decoders. New here: any head as learner,
    and mean shift of each level's tokens before its learner.

    Learners' logits are resized to the finest level's grid and then merged, as published. The result is the logarithm
    of the merged probabilities, which the published training upsamples, too. Its predictions upsample the probabilities
    themselves and average these over windows; so do a model's with this head. Learned merges blend logits, and
    predictions upsample those. The published code sums learners where Eq. 3 averages, and at several scales averages
    the softmax of that sum; here it is the probabilities. Training supervises the merged prediction and each learner.
    With `num_classes=1` probabilities of class and background are merged, and the result is the logit of the class.
    `merge` and `levels` may be changed on a trained head.

    Args:
        in_channels: Channels of each map, fine to coarse.
        num_classes: Number of classes K.
        learner: A name in `segheads.heads.HEADS` of a single-level head, or a callable that takes `in_channels` and
            `num_classes` and returns one.
        learner_kwargs: Further arguments of a learner given by name, such as `{"num_layers": 3}`.
        merge: A name in `segheads.merges.MERGES`: `"average"`, `"product"`, `"majority_vote"`, or the learned
            `"hierarchical_attention"` and `"explicit_attention"`, with `"light_"` before them as in version 0.1.0.
        share: What learners have in common (the paper's Table 2): `"none"`; `"decoder"`, all but the class embeddings;
            or `"class_embeddings"` alone.
        shift: Mean shift of each level's tokens before its learners, in the options of `MeanShift`; None means none.
        levels: Which levels have a learner, 0 the finest; None means all. Afterwards: which of them vote.
        learners_per_level: Learners on each level, from weights of their own.

    Shape:
        A list of `(B, C_i, h_i, w_i)`, fine to coarse, to `(B, K, h_0, w_0)`, log-probabilities.

    Raises:
        ValueError: If a name is unknown, a learner is no single-level head, levels are out of range, sharing does not
            fit the channels or the learner, or the merge does not fit the number of learners.

    Examples:
        >>> import torch
        >>> head = SenFormerHead([64, 64, 64, 64], 19)
        >>> features = [torch.randn(1, 64, n, 2 * n) for n in (16, 8, 4, 2)]
        >>> head(features).shape, len(head.predictions(features))
        (torch.Size([1, 19, 16, 32]), 5)
        >>> head.merge, head.levels = "product", [0, 1]  # on a trained head
    """

    multi_level = True
    preferred_pyramid = "fpnt"
    is_ensemble = True

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        learner: str | Callable[[int, int], Head] = "class_attention",
        learner_kwargs: dict[str, Any] | None = None,
        merge: str = "average",
        share: Share = "none",
        shift: ShiftOptions | None = None,
        levels: Sequence[int] | None = None,
        learners_per_level: int = 1,
    ) -> None:
        super().__init__(in_channels, num_classes)
        if learners_per_level < 1:
            raise ValueError(f"learners_per_level must be 1 or more; got {learners_per_level}")
        every = range(len(self.in_channels))
        self._levels = self._built = _check_levels(every if levels is None else levels, every, "there are")
        self.learners_per_level = learners_per_level
        build = _learner(learner, learner_kwargs or {})
        widths = [self.in_channels[level] for level in self._built]
        # learner m stands on level _built[m // learners_per_level]
        self.learners = nn.ModuleList(
            _check_learner(build(C, num_classes), C, num_classes) for C in widths for _ in range(learners_per_level)
        )
        _tie(list(self.learners), share)
        self.shifts = nn.ModuleList(MeanShift(C, **(shift or {})) for C in (widths if shift is not None else []))
        is_learned = isinstance(MERGES.get(merge), type)
        self.learned_merge = MERGES[merge](len(self.learners), num_labels(num_classes)) if is_learned else None
        self._merge = self._learned = merge if self.learned_merge is not None else "average"
        self.merge = merge

    @property
    def merge(self) -> str:
        """Name of the merge; learned ones can be chosen only if the head was built with them."""
        return self._merge

    @merge.setter
    def merge(self, merge: str) -> None:
        _check_merge(merge, len(self._levels) * self.learners_per_level)
        self._check_learned(merge, self._levels)
        self._merge = merge

    @property
    def averages_probabilities(self) -> bool:
        """Whether predictions upsample probabilities: with a learned merge, which blends logits, they do not."""
        return self.learned_merge is None or self._merge != self._learned

    @property
    def levels(self) -> list[int]:
        """The levels whose learners vote, 0 the finest."""
        return list(self._levels)

    @levels.setter
    def levels(self, levels: Sequence[int] | None) -> None:
        chosen = _check_levels(self._built if levels is None else levels, self._built, "have learners")
        _check_merge(self._merge, len(chosen) * self.learners_per_level)
        self._check_learned(self._merge, chosen)
        self._levels = chosen

    @property
    def mean_shift_layers(self) -> int:
        """How often each level's tokens are shifted; 0 means no shift."""
        return max((shift.num_layers for shift in self._shifts()), default=0)

    @mean_shift_layers.setter
    def mean_shift_layers(self, num_layers: int) -> None:
        if num_layers and not len(self.shifts):
            raise ValueError(
                f"mean_shift_layers cannot become {num_layers}: the head was built without a shift, whose weights must "
                "be trained"
            )
        for shift in self._shifts():
            shift.num_layers = num_layers

    def _shifts(self) -> list[MeanShift]:
        return [shift for shift in self.shifts if isinstance(shift, MeanShift)]

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Log-probabilities `(B, K, h_0, w_0)` of the merged prediction."""
        return self.predictions(x)[0]

    def predictions(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The merged log-probabilities, then each voting learner's logits, all on the finest grid."""
        logits = self.learner_logits(x)
        return [self._merged(logits), *logits]

    def learner_logits(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Logits `(B, K, h_0, w_0)` of each voting learner, resized to the finest grid.

        Args:
            x: The maps, fine to coarse.
        """
        self._check(x)
        size = (x[0].shape[2], x[0].shape[3])
        logits: list[Tensor] = []
        for place, level in enumerate(self._built):
            if level not in self._levels:
                continue
            features = self.shifts[place](x[level]) if len(self.shifts) else x[level]
            first = place * self.learners_per_level
            learners = self.learners[first : first + self.learners_per_level]
            logits.extend(upsample(learner(features), size) for learner in learners)
        return logits

    def settings(self) -> dict[str, Any]:
        """`merge` and `levels`, which may be changed on a trained head."""
        return {"merge": self._merge, "levels": self.levels}  # restored in this order, every step is a valid state

    def _merged(self, logits: list[Tensor]) -> Tensor:
        is_learned = self._merge == self._learned and self.learned_merge is not None
        merge: Any = self.learned_merge if is_learned else MERGES[self._merge]
        if self.num_classes == 1:
            merged: Tensor = without_background(merge([with_background(x) for x in logits]))
            return merged
        result: Tensor = merge(logits)
        return result

    def _check_learned(self, merge: str, levels: Sequence[int]) -> None:
        if not isinstance(MERGES[merge], type):
            return
        if self.learned_merge is None or merge != self._learned:
            raise ValueError(f"merge {merge!r} has weights that must be trained; build the head with merge={merge!r}")
        if list(levels) != list(self._built):
            raise ValueError(f"merge {merge!r} was built for levels {list(self._built)}; got {list(levels)}")


def _learner(learner: str | Callable[[int, int], Head], kwargs: dict[str, Any]) -> Callable[[int, int], Head]:
    if not isinstance(learner, str):
        if kwargs:
            raise ValueError("learner_kwargs belong to a learner given by name; a callable brings its own")
        return learner
    build = find_head(learner)
    if build.multi_level:
        raise ValueError(f"a learner must be a single-level head; {learner!r} takes a list of maps")
    return partial(build, **kwargs)


def _check_learner(learner: Any, in_channels: int, num_classes: int) -> Head:
    if not isinstance(learner, Head) or learner.multi_level:
        raise ValueError(f"a learner must be a single-level head; got a {type(learner).__name__}")
    if (learner.in_channels, learner.num_classes) != (in_channels, num_classes):
        raise ValueError(
            f"a learner of {in_channels} channels and {num_classes} classes was asked for; got a "
            f"{type(learner).__name__} of {learner.in_channels} and {learner.num_classes}"
        )
    return learner


def _check_levels(levels: Sequence[int], available: Sequence[int], which: str) -> list[int]:
    chosen = sorted(levels)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(available):
        raise ValueError(f"levels must be some of {list(available)}, which {which}, each once; got {list(levels)}")
    return chosen


def _check_merge(merge: str, num_learners: int) -> None:
    if merge not in MERGES:
        raise ValueError(f"no merge is called {merge!r}; known: {', '.join(MERGES)}")
    check_count(merge, num_learners)


def _tie(learners: list[Any], share: str) -> None:
    """Give all learners the first one's decoder or class embeddings."""
    if share not in get_args(Share):
        raise ValueError(f"share must be one of {', '.join(get_args(Share))}; got {share!r}")
    first, *others = learners
    if share == "none":
        return
    widths = [learner.in_channels for learner in learners]
    if len(set(widths)) > 1:
        raise ValueError(f"share={share!r} needs levels of the same channels, as a pyramid gives; got {widths}")
    if share == "class_embeddings":
        if not isinstance(getattr(first, "class_embeddings", None), nn.Parameter):
            raise ValueError(f"share='class_embeddings' needs a learner that has some; {type(first).__name__} has none")
        for learner in others:
            learner.class_embeddings = first.class_embeddings
        return
    for learner in others:
        for name, module in first.named_children():
            setattr(learner, name, module)
