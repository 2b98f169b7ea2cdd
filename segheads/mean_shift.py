"""Mean shift as a block from features to features."""

import inspect
import math
from typing import Annotated, Any, cast

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from segheads.functional import mean_shift
from segheads.functional.affinity import grid_positions, scores, takes_fused
from segheads.functional.kernels import find_kernel
from segheads.functional.mean_shift import mean_shift_steps
from segheads.modules import weight_and_bias
from segheads.ranges import Range

INITIAL_STD = 0.02  # of the projection's weights, as published


class StepOptions(TypedDict, total=False):
    """How one shift is made: all options of `MeanShift` but how often."""

    shift_channels: Annotated[int | None, Range(1)]
    """Width in which distances are measured (d_ms); None means that of the features."""
    kernel: str
    """The thesis' dot, or gaussian, cosine, or another of segheads.functional.kernels.KERNELS."""
    bandwidth: Annotated[float | None, Range(0, above=True)]
    """Bandwidth in units of the projected tokens; None means the kernel's own."""
    spatial_bandwidth: Annotated[float | None, Range(0, above=True)]
    """Also weigh tokens by their distance in the map, with this bandwidth in cells; None does not."""
    learn_bandwidth: bool
    """Learn the bandwidths."""
    blurring: bool
    """Shift the tokens among themselves, rather than against the original ones."""
    step: Annotated[float, Range(0, above=True)]
    """How far a shift goes towards the average, as a fraction."""
    learn_step: bool
    """Learn the step."""


class ShiftOptions(StepOptions, total=False):
    """The options of `MeanShift`: keywords of the heads that shift, JSON in a saved model, flags of a recipe."""

    num_layers: Annotated[int, Range(0)]
    """How often to shift (L_ms)."""


class MeanShift(nn.Module):
    """Shifts tokens towards the modes of their density, `num_layers` times with the same weights.

    The block of the MeanShifter; the formulas are at `segheads.functional.mean_shift`. Features in, features out, so it
    may stand before any head. The published code has a bias in the projection, which the thesis' formula leaves out.
    The defaults are the thesis' kernel, with which depth destroys; `kernel="cosine"` or `"gaussian"` and
    `blurring=False` do not (see the results page of the documentation).

    `num_layers` and `bandwidth` may be changed at any time, since all layers share one projection (thesis, Table 2); 0
    layers mean no shift. A block *built* with 0 layers freezes its weights, which could never receive a gradient.

    Args:
        channels: Channels C of the features.
        shift_channels: Width D of the space in which distances are measured (the thesis' d_ms); None means `channels`.
        num_layers: How often to shift (the thesis' L_ms).
        kernel: `"dot"`, `"gaussian"`, `"cosine"`, or another name in `segheads.functional.kernels.KERNELS`.
        bandwidth: The bandwidth h in units of the projected tokens. None means `D ** 0.25` for the dot kernel (the
            thesis') and `0.1 ** 0.5` for the cosine; for the Gaussian `0.01 (C D) ** 0.5`, which is half the projected
            tokens' length where training starts. There `D ** 0.25` is so wide that three shifts leave but the mean.
        spatial_bandwidth: Also weigh tokens by their distance in the map, with this bandwidth in cells; the block then
            takes maps alone. None weighs tokens wherever they are.
        learn_bandwidth: Learn the logarithms of both bandwidths, so that they stay positive, from their values on.
        blurring: Shift the tokens among themselves, rather than against the original ones.
        step: How far to go towards the average, as a fraction.
        learn_step: Learn the step, from `step` on.

    Shape:
        `(B, C, h, w)` or `(B, N, C)`, in and out.

    Raises:
        ValueError: If `num_layers` is negative, `shift_channels` below 1, the kernel unknown, a bandwidth or the step
            not above 0, or the input has other channels or no places.

    Examples:
        >>> import torch
        >>> shift = MeanShift(192, num_layers=3, kernel="gaussian", learn_bandwidth=True, blurring=False)
        >>> shift(torch.randn(2, 192, 16, 24)).shape, shift(torch.randn(2, 384, 192)).shape
        (torch.Size([2, 192, 16, 24]), torch.Size([2, 384, 192]))
        >>> round(shift.bandwidth, 2)
        1.92
        >>> shift.bandwidth = 2.0  # narrower at inference: more modes
    """

    def __init__(
        self,
        channels: int,
        *,
        num_layers: int = 1,
        shift_channels: int | None = None,
        kernel: str = "dot",
        bandwidth: float | None = None,
        spatial_bandwidth: float | None = None,
        learn_bandwidth: bool = False,
        blurring: bool = True,
        step: float = 1.0,
        learn_step: bool = False,
    ) -> None:
        super().__init__()
        shift_channels = channels if shift_channels is None else shift_channels
        if channels < 1 or shift_channels < 1:
            raise ValueError(f"channels and shift_channels must be 1 or more; got {channels} and {shift_channels}")
        how = find_kernel(kernel)
        if not step > 0:
            raise ValueError(f"step must be above 0; got {step}")
        self.kernel = kernel
        self.blurring = blurring
        self.projection = nn.Linear(channels, shift_channels)
        trunc_normal_(self.projection.weight, std=INITIAL_STD)
        nn.init.zeros_(self.projection.bias)
        if bandwidth is None:
            bandwidth = how.initial_bandwidth(channels, shift_channels, INITIAL_STD)
        is_spatial = spatial_bandwidth is not None
        self.log_bandwidth = nn.Parameter(torch.zeros(())) if learn_bandwidth else None
        self.log_spatial_bandwidth = nn.Parameter(torch.zeros(())) if learn_bandwidth and is_spatial else None
        self.bandwidth = bandwidth
        self._spatial_bandwidth: float | None = None
        if spatial_bandwidth is not None:
            self._spatial_bandwidth = _set("spatial_bandwidth", spatial_bandwidth, self.log_spatial_bandwidth)
        self.step: float | Tensor = nn.Parameter(torch.tensor(float(step))) if learn_step else step
        self.num_layers = num_layers
        if num_layers == 0:
            self.requires_grad_(False)

    @property
    def num_layers(self) -> int:
        """How often to shift."""
        return self._num_layers

    @num_layers.setter
    def num_layers(self, num_layers: int) -> None:
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0:
            raise ValueError(f"num_layers must be an integer of 0 or more; got {num_layers!r}")
        self._num_layers = num_layers

    @property
    def bandwidth(self) -> float:
        """The bandwidth h, in units of the projected tokens."""
        return self._bandwidth if self.log_bandwidth is None else self.log_bandwidth.exp().item()

    @bandwidth.setter
    def bandwidth(self, bandwidth: float) -> None:
        self._bandwidth = _set("bandwidth", bandwidth, self.log_bandwidth)

    @property
    def spatial_bandwidth(self) -> float | None:
        """The bandwidth s of places, in cells of the map; None in a block that was built without one."""
        return (
            self._spatial_bandwidth if self.log_spatial_bandwidth is None else self.log_spatial_bandwidth.exp().item()
        )

    @spatial_bandwidth.setter
    def spatial_bandwidth(self, spatial_bandwidth: float) -> None:
        if self._spatial_bandwidth is None:
            raise ValueError(f"this block was built without a spatial bandwidth and can not take {spatial_bandwidth!r}")
        self._spatial_bandwidth = _set("spatial_bandwidth", spatial_bandwidth, self.log_spatial_bandwidth)

    def settings(self) -> dict[str, Any]:
        """What may be changed on a trained block: layers, and bandwidths that are no weights."""
        known = {
            "num_layers": self.num_layers,
            "bandwidth": self.bandwidth,
            "spatial_bandwidth": self.spatial_bandwidth,
        }
        fixed = {"num_layers"} if self.learns_bandwidth else known.keys()
        return {name: value for name, value in known.items() if name in fixed and value is not None}

    @property
    def learns_bandwidth(self) -> bool:
        """Whether the bandwidths are weights."""
        return self.log_bandwidth is not None

    def forward(self, x: Tensor) -> Tensor:
        """Shifted features, in the shape of x."""
        return mean_shift(x, *weight_and_bias(self.projection), **self._options())

    def trajectory(self, x: Tensor) -> list[Tensor]:
        """The features after 0, 1, ..., `num_layers` shifts, each in the shape of x."""
        return list(mean_shift_steps(x, *weight_and_bias(self.projection), **self._options()))

    def affinity(self, x: Tensor, index: int) -> Tensor:
        """How much each token weighs in the first shift of token `index`, which counts rows of the map one by one.

        Shape:
            `(B, C, h, w)` or `(B, N, C)` to `(B, N)`; each row sums to 1.

        Raises:
            IndexError: If there is no such token.
        """
        tokens = x if x.ndim == 3 else rearrange(x, "b c h w -> b (h w) c")
        if not 0 <= index < tokens.shape[1]:
            raise IndexError(f"index must be 0..{tokens.shape[1] - 1}, of a token; got {index}")
        kernel, one = find_kernel(self.kernel), slice(index, index + 1)
        r = kernel.measured(self.projection(tokens))
        places: tuple[Tensor | None, Tensor | None, float] = (None, None, 1.0)
        if self.spatial_bandwidth is not None:
            grid = grid_positions(x)
            places = (grid[one], grid, self.spatial_bandwidth)
        return scores(r[:, one], r, kernel, self.bandwidth, *places).weights()[:, 0]

    def path(self, x: Tensor) -> str:
        """How x is shifted where it is and as it is: `"fused"`, by PyTorch's attention, or in `"tiles"`.

        Shape:
            `(B, C, h, w)` or `(B, N, C)`; h, w and N may be others than those of the features that are meant.
        """
        tokens, kernel = x if x.ndim == 3 else rearrange(x, "b c h w -> b (h w) c"), find_kernel(self.kernel)
        r, options = kernel.measured(self.projection(tokens)), self._options()
        places: tuple[Any, ...] = ()
        if options["spatial_bandwidth"] is not None:
            places = (grid_positions(x), grid_positions(x), options["spatial_bandwidth"])
        how = scores(r, r, kernel, options["bandwidth"], *places)
        return "fused" if takes_fused(tokens, how) else "tiles"

    def extra_repr(self) -> str:
        """Adds the kernel, the bandwidth, what is learned, and the number of layers to the module's representation."""

        def shown(value: float, is_learned: bool) -> str:
            return f"{value:.4g}{' (learned)' if is_learned else ''}"

        parts = [f"kernel={self.kernel}", f"bandwidth={shown(self.bandwidth, self.learns_bandwidth)}"]
        if self.spatial_bandwidth is not None:
            parts.append(f"spatial_bandwidth={shown(self.spatial_bandwidth, self.learns_bandwidth)}")
        step = self.step.item() if isinstance(self.step, Tensor) else self.step
        parts.append(f"blurring={self.blurring}, step={shown(step, isinstance(self.step, Tensor))}")
        return ", ".join([*parts, f"num_layers={self._num_layers}"])

    def _options(self) -> dict[str, Any]:
        return {
            "num_layers": self._num_layers,
            "kernel": self.kernel,
            "bandwidth": self._bandwidth if self.log_bandwidth is None else self.log_bandwidth.exp(),
            "spatial_bandwidth": (
                self._spatial_bandwidth if self.log_spatial_bandwidth is None else self.log_spatial_bandwidth.exp()
            ),
            "blurring": self.blurring,
            "step": self.step,
        }


def _set(name: str, value: float, logarithm: nn.Parameter | None) -> float:
    """Check a bandwidth; where it is learned, its logarithm takes it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
    if logarithm is not None:
        with torch.no_grad():
            logarithm.fill_(math.log(value))
    return float(value)


def default_step(**options: Unpack[StepOptions]) -> StepOptions:
    """All options of one shift, with the block's defaults for what is not given.

    Args:
        **options: What is to differ.

    Examples:
        >>> default_step(kernel="cosine")["kernel"], default_step()["step"]
        ('cosine', 1.0)
    """
    parameters = inspect.signature(MeanShift).parameters
    defaults = {name: parameters[name].default for name in StepOptions.__annotations__}
    return cast(StepOptions, {**defaults, **options})
