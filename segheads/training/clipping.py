"""Ways to clip a gradient, by timm's names."""

from collections.abc import Iterable
from typing import Literal, get_args

from accelerate import Accelerator
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

ClipMode = Literal["norm", "value", "agc"]


def check_clipping(mode: str, limit: float | None) -> None:
    """Refuse what cannot be.

    Args:
        mode: How to clip.
        limit: To what; None does not clip.

    Raises:
        ValueError: If there is no such way, the limit is not above 0, or a way was chosen and no limit.

    Examples:
        >>> check_clipping("agc", 0.01)
    """
    if mode not in get_args(ClipMode):
        raise ValueError(f"clip_mode must be one of {', '.join(get_args(ClipMode))}; got {mode!r}")
    if limit is None and mode != "norm":
        raise ValueError(f"clip_mode {mode} needs max_grad_norm, its limit (timm's recipes: 0.01 for agc); got None")
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm must be above 0, or None, which does not clip; got {limit}")


def clip_gradients(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], limit: float, mode: ClipMode = "norm"
) -> Tensor | None:
    """Clip gradients in place, after the scaler of fp16 was divided out; gives their norm before, if that is clipped.

    `"agc"` clips every weight, the classifier's too, which Brock et al. (https://arxiv.org/abs/2102.06171) leave out.

    Args:
        accelerator: What prepared the optimizer.
        parameters: Whose gradients.
        limit: The norm of all gradients together, the size of each number, or for `"agc"` the norm of each unit's
            gradient over that of its weights.
        mode: Which of the three.
    """
    if mode == "norm":
        norm: Tensor | None = accelerator.clip_grad_norm_(parameters, limit)
        return norm
    accelerator.unscale_gradients()
    dispatch_clip_grad(parameters, limit, mode=mode)
    return None
