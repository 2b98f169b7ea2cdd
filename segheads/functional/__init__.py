"""Pure functions that heads and models are made of."""

from segheads.functional.kernels import KERNELS
from segheads.functional.mean_shift import mean_shift
from segheads.functional.upsample import upsample, upsample_argmax, upsample_cross_entropy

__all__ = ["KERNELS", "mean_shift", "upsample", "upsample_argmax", "upsample_cross_entropy"]
