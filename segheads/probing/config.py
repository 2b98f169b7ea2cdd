"""What a run of probes can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from segheads.errors import OptionError
from segheads.heads import list_heads
from segheads.plan import HeadChoice, parse_head
from segheads.ranges import Range
from segheads.training.config import MAY_DIFFER, TrainingConfig
from segheads.training.keeping import KeepingConfig

# The backbone is in no checkpoint: a resumed run must build the same one.
PROBES_MAY_DIFFER = (MAY_DIFFER | {"cache", "cache_gb"}) - {"pretrained", "backbone_weights"}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(TrainingConfig):
    """The numbers of a run of probes; what `TrainingConfig` says of the backbone's training does not apply."""

    heads: tuple[str, ...]
    """Each NAME, NAME(option=value, ...), or either with @ PYRAMID(option=value, ...); or all, that fit."""
    learning_rates: Annotated[tuple[float, ...], Range(0, above=True)]
    """The rates that every head learns with."""
    distinct_batches: Annotated[int | None, Range(1)] = None
    """Go round in so many batches of crops, in another order each time; None crops anew in every epoch."""
    cache: Path | None = None
    """Keep the backbone's maps in this folder, for this run and later ones."""
    cache_gb: Annotated[float, Range(0, above=True)] = 20.0
    """How large that folder may grow, in units of 1e9 bytes."""

    def choices(self) -> list[HeadChoice]:
        """The heads that are asked for.

        Raises:
            ValueError: If one cannot be read.
        """
        return [parse_head(text) for word in self.heads for text in (list_heads() if word == "all" else [word])]

    def names(self, choice: HeadChoice) -> bool:
        """Whether a head is asked for by name, and not as one of all.

        Args:
            choice: The head.
        """
        return str(choice) in (str(parse_head(word)) for word in self.heads if word != "all")

    def check(self) -> None:
        """Refuse what heads on frozen features have no use for.

        Raises:
            OptionError: If an option of the training of one model is set.
        """
        if not self.data.image_form.is_rgb or self.data.band_mean is not None:
            own = " with band_mean" if self.data.band_mean is not None else ""
            raise OptionError(
                "probes take images of 3 channels and 8 bit as the backbone normalises them; got "
                f"{self.data.image_form}{own}: train a model for each head"
            )
        if self.machine.mixed_precision == "fp16":
            raise OptionError(
                "mixed_precision fp16 scales the loss by one factor, which one head's overflow would change for all; "
                "use bf16 or no"
            )
        if self.model.init_from is not None:
            raise OptionError("init_from is for one model; --backbone-weights takes a saved model's folder")
        if self.model.head != "all" or self.optimization.learning_rate:
            raise OptionError("head and learning_rate are for one model; give heads and learning_rates")
        if self.keeping != KeepingConfig():
            raise OptionError("best, keep, ema and patience are for one model; probes end with their last weights")
        for option, is_set in {
            "compile": self.machine.compile,
            "extend": self.extend is not None,
            "calibration": self.loop.calibration,
            "freeze_backbone": self.model.freeze_backbone,
            "freeze_stages": self.model.freeze_stages,
            "grad_checkpointing": self.machine.grad_checkpointing,
            "layer_decay": self.optimization.layer_decay != 1,
            "skip_nonfinite": self.optimization.skip_nonfinite,
        }.items():
            if is_set:
                raise OptionError(f"{option} is for one model; train the head that you choose with its own recipe")
