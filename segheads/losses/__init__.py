"""What training makes small: losses by name, from logits on a head's grid and labels at full size.

No loss here holds logits at the labels' size; `segheads.functional.upsample_cross_entropy` is the model for new ones.
"""

from segheads.losses.base import PixelLoss
from segheads.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy, OhemCrossEntropy
from segheads.losses.regions import Dice, Focal, Jaccard, Lovasz, SmpLoss, Tversky
from segheads.losses.registry import LOSSES, find_loss
from segheads.losses.sums import LossSum, Term, create_loss, is_binary, parse_loss

LOSSES |= {
    "ce": CrossEntropy,
    "ohem": OhemCrossEntropy,
    "dice": Dice,
    "jaccard": Jaccard,
    "tversky": Tversky,
    "lovasz": Lovasz,
    "focal": Focal,
    "bce": BinaryCrossEntropy,
}

__all__ = [
    "LOSSES",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Jaccard",
    "LossSum",
    "Lovasz",
    "OhemCrossEntropy",
    "PixelLoss",
    "SmpLoss",
    "Term",
    "Tversky",
    "create_loss",
    "find_loss",
    "is_binary",
    "parse_loss",
]
