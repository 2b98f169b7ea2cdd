"""The 1x1 convolution that ends a convolutional head."""

from typing import Literal, get_args

from torch import nn

Init = Literal["xavier", "published"]


def pixel_classifier(channels: int, num_classes: int, init: Init) -> nn.Conv2d:
    """A 1x1 convolution to K classes, its bias at 0.

    Args:
        channels: Channels of the map.
        num_classes: Number of classes K.
        init: How weights start: `"xavier"` (Glorot's uniform distribution, as all of smp's heads start), or
            `"published"`, MMSegmentation's normal distribution of standard deviation 0.01, which learns later.

    Raises:
        ValueError: If `init` is neither.
    """
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(get_args(Init))}; got {init!r}")
    classifier = nn.Conv2d(channels, num_classes, 1)
    if init == "xavier":
        nn.init.xavier_uniform_(classifier.weight)
    else:
        nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]  # there is a bias
    return classifier
