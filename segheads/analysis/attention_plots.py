"""Figures of attention and of how far it reaches."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from segheads.analysis.attention import AttendedDistance, AttentionMap
from segheads.drawing import (
    OKABE_ITO,
    check_picture,
    colour_bar,
    in_pixels,
    mark_patch,
    part_title,
    picture_sheet,
    show_picture,
    show_shares,
)

BAR = "share of attention\n(percent of the panel's largest)"


def plot_attention(
    maps: Sequence[AttentionMap],
    picture: Tensor,
    pixel: tuple[int, int] | None = None,
    *,
    per_head: bool = False,
    columns: int = 4,
    title: str | None = None,
) -> Figure:
    """Draw where a query looks: the image, then one panel for each layer, or for each head of each layer.

    Colours go from 0 to the largest share of each panel, since layers differ by much. The title tells that share, and
    how many times it is what each patch would get if all got the same.

    Args:
        maps: What `encoder_attention`, `head_attention` or `class_attention` gave.
        picture: The image, before it was normalised for the model.
        pixel: Row and column (y, x) of the pixel that was asked for, which is marked; None for a class.
        per_head: A row of panels for each layer, one for each head, rather than the mean over heads.
        columns: Panels beside each other, without `per_head`.
        title: Above the image, such as the name of the class that asks.

    Shape:
        picture `(3, H, W)`, values from 0 to 1.

    Raises:
        ValueError: If there is no map or the picture has another shape.
    """
    if not maps:
        raise ValueError("a figure of attention needs one map or more; got none")
    size = check_picture(picture)
    panels: list[tuple[AttentionMap, int | None] | None] = []  # a layer and a head, or None for the mean over heads
    if per_head:
        columns = max(len(layer.patches) for layer in maps)
        for layer in maps:
            heads = len(layer.patches)
            panels += [*((layer, head) for head in range(heads)), *[None] * (columns - heads)]
    else:
        panels += [None, *((layer, None) for layer in maps)]
    if per_head:  # a column for the image
        columns += 1
        panels = [panel for row in range(len(maps)) for panel in (None, *panels[row * (columns - 1) :][: columns - 1])]
    figure, axes = picture_sheet(len(panels), columns, size[0] / size[1])
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        if panel is None and place:
            axis.remove()
        elif panel is None:
            show_picture(axis, picture, title or "image")
        else:
            layer, head = panel
            shares = layer.patches.mean(0) if head is None else layer.patches[head]
            name = f"{part_title(layer.part)}, layer {layer.layer}" + ("" if head is None else f", head {head + 1}")
            shown = show_shares(axis, shares, layer.cell, size, name)
            if per_head and place > columns and place % columns == 1:  # beside where an image would be
                in_pixels(axis, size, axis.get_title(), is_leftmost=True)
        if pixel is not None and (panel is not None or place == 0):
            mark_patch(axis, pixel, (panel or (maps[0],))[0].cell)
    colour_bar(figure, shown, figure.axes, BAR)
    return figure


def plot_attended_distance(distances: Sequence[AttendedDistance], *, title: str = "how far heads look") -> Figure:
    """Draw the mean attended distance of every head over the layers, as ViT's Fig. 7 and Segmenter's do.

    Args:
        distances: What `attended_distance` gave.
        title: Above the plot.

    Raises:
        ValueError: If there are no distances.
    """
    if not distances:
        raise ValueError("a figure of distances needs one layer or more; got none")
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    layers = [entry.layer for entry in distances]
    for entry in distances:
        label = "a head" if entry is distances[0] else None
        heads = entry.pixels.tolist()
        axis.plot([entry.layer] * len(heads), heads, "o", color=OKABE_ITO[0], alpha=0.75, markersize=5, label=label)
    means = [entry.pixels.mean().item() for entry in distances]
    axis.plot(layers, means, "-", color=OKABE_ITO[1], linewidth=2, zorder=1, label="mean of heads")
    uniform = [entry.uniform for entry in distances]
    axis.plot(layers, uniform, "--", color="grey", label="attention to all patches alike")
    axis.set(xlabel="layer", ylabel="mean attended distance (pixels)", title=title)
    axis.set_ylim(0, 1.05 * max(*uniform, *(entry.pixels.max().item() for entry in distances)))
    axis.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
