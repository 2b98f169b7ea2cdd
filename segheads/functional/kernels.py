"""The kernels of mean shift by name: how much a token weighs in the average of another."""

from typing import ClassVar

from torch import Tensor


class Kernel:
    """Weights that are the softmax of `q·k / h²`, or with `by_distance` of `-|q - k|² / 2h²`, over all tokens k.

    q and k are what `measured` makes of projected tokens, h is the bandwidth. Either is one product of matrices, which
    fused attention computes without an (N, N) matrix. A subclass says what differs.

    Attributes:
        by_distance: Whether distances are compared, rather than products.
    """

    by_distance: ClassVar[bool] = False

    def measured(self, r: Tensor) -> Tensor:
        """Projected tokens `(B, N, D)` as the kernel compares them, in that shape."""
        return r

    def default_bandwidth(self, shift_channels: int) -> float:
        """The bandwidth of tokens of D channels: `D ** 0.25`, so that scores are divided by sqrt(D)."""
        return shift_channels**0.25

    def initial_bandwidth(self, channels: int, shift_channels: int, std: float) -> float:  # noqa: ARG002 for others
        """The bandwidth that suits a projection that training starts from; by default `default_bandwidth`.

        Args:
            channels: Channels C of the features, which the norm before a head gives a length of `sqrt(C)`.
            shift_channels: Width D of what they are projected to.
            std: Of the projection's weights.
        """
        return self.default_bandwidth(shift_channels)


class Dot(Kernel):
    """The MeanShifter's: `softmax(rᵢ·rⱼ / h²)`. Tokens of large norm attract all others."""


class Gaussian(Kernel):
    """`softmax(-|rᵢ - rⱼ|² / 2h²)`, the mean shift of Fukunaga and Hostetler (1975) and Cheng (1995)."""

    by_distance = True

    def initial_bandwidth(self, channels: int, shift_channels: int, std: float) -> float:
        """Half the length of projected tokens, `std / 2 * sqrt(C D)`; from `D ** 0.25` three shifts leave the mean."""
        return std / 2 * (channels * shift_channels) ** 0.5


class Cosine(Kernel):
    """`softmax(cos(rᵢ, rⱼ) / h²)`, von Mises-Fisher mean shift with the concentration 1/h².

    Directions all have the norm 1, so that their products weigh as their distances do.
    """

    def measured(self, r: Tensor) -> Tensor:
        """The tokens' directions; one shorter than 1e-4 has none, and a gradient like that of one of length 1."""
        length = r.norm(dim=-1, keepdim=True)
        return r / length.where(length > 1e-4, 1)

    def default_bandwidth(self, shift_channels: int) -> float:  # noqa: ARG002 for the others
        """`sqrt(0.1)`, an inverse temperature of 10, for any width."""
        return 10**-0.5


KERNELS: dict[str, Kernel] = {
    "dot": Dot(),
    "gaussian": Gaussian(),
    "cosine": Cosine(),
}
"""The kernels by the names that mean shift and `--kernel` take; a name of your own may be added."""


def find_kernel(name: str) -> Kernel:
    """The kernel of a name.

    Args:
        name: A name in `KERNELS`.

    Raises:
        ValueError: If no kernel has that name; the message lists the known ones.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {name!r}")
    return KERNELS[name]
