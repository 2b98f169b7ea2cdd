"""Every figure: that there is something to see, that axes say what they show, and that nothing is cut off."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from segheads.analysis import (
    Affinity,
    AttendedDistance,
    AttentionMap,
    LabelsByShift,
    Trajectory,
    compare_labels,
    cosine_similarity,
    plot_affinity,
    plot_attended_distance,
    plot_attention,
    plot_disagreement,
    plot_labels_by_shift,
    plot_projection,
    plot_similarity,
    plot_trajectory,
    project,
)
from segheads.analysis.mean_shift_plots import _chosen_steps
from segheads.drawing import COLOURS, OKABE_ITO, ClassColours

H, W = 40, 70
NAMES = ["sky", "road", "car", "tree", "a class of a very long name"]
MANY = [f"class number {n}" for n in range(150)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(K: int, seed: int = 0) -> torch.Tensor:
    """A map of stripes and some noise."""
    stripes = torch.arange(W).div(W / K).long().expand(H, W).clone()
    return torch.where(noise(H, W, seed=seed) < 0.2, (noise(H, W, seed=seed + 1) * K).long(), stripes)


def pixels(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    return np.asarray(Image.open(file).convert("RGB"))


def check(figure: Figure, titles: list[str], x: str, y: str) -> None:
    """Titles of the panels, labels of those that have axes, many colours, and no text beyond the rim."""
    drawn = pixels(figure)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 30
    panels = [axis for axis in figure.axes if axis.axison and axis.get_label() != "<colorbar>"]
    assert [axis.get_title() for axis in panels] == titles
    for axis in panels:
        assert axis.get_xlabel().startswith(x) or axis.get_title() == "spread"
    assert panels[0].get_ylabel().startswith(y)
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert all(bar.get_ylabel() for bar in bars)
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01, box
    assert box.y0 >= -0.01, box
    assert box.x1 <= width + 0.01, box
    assert box.y1 <= height + 0.01, box


def maps(layers: int, heads: int = 3, part: str = "encoder") -> list[AttentionMap]:
    found = []
    for n in range(layers):
        patches = torch.zeros(heads, 5, 9)
        patches[:, 1:3, 2:6] = noise(heads, 2, 4, seed=n)
        patches[:, 2, 2] = 1.0
        patches *= 0.9 / patches.sum((1, 2), keepdim=True)
        found.append(AttentionMap(part, n + 1, f"blocks.{n}", patches, torch.full((heads, 1), 0.1), (8.0, 8.0)))
    return found


def shown_title(name: str, shares: torch.Tensor) -> str:
    largest = shares.max().item()
    return f"{name}\nlargest {100 * largest:.2g} %, {largest * shares.numel():.1f} times even"


@pytest.mark.parametrize("layers", [1, 4])
def test_attention(layers):
    found = maps(layers)
    figure = plot_attention(found, noise(3, H, W), (20, 60))
    titles = [shown_title(f"encoder, layer {m.layer}", m.patches.mean(0)) for m in found]
    check(figure, ["image", *titles], "x (pixels)", "y (pixels)")
    for axis in figure.axes[: 1 + layers]:
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, W), (H, 0))
        (frame,) = axis.patches
        assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((56, 16), 8, 8)
    shown = figure.axes[1].images[0]
    assert shown.get_cmap().name == "cividis"
    assert shown.get_extent() == [0, 72, 40, 0]  # beyond the image's 70 columns
    expected = 100 * found[0].patches.mean(0) / found[0].patches.mean(0).max()
    np.testing.assert_allclose(shown.get_array(), expected, rtol=1e-5)


def test_attention_of_every_head():
    found = [*maps(2), *maps(1, heads=2, part="head.learners.1")]
    figure = plot_attention(found, noise(3, H, W), per_head=True, title="class car")
    titles = [
        shown_title(f"{name}, layer {m.layer}, head {n + 1}", m.patches[n])
        for m, name in zip(found, ["encoder", "encoder", "learner 2"], strict=True)
        for n in range(len(m.patches))
    ]
    check(figure, ["class car", *titles], "x (pixels)", "y (pixels)")
    assert not any(axis.patches for axis in figure.axes[:-1])  # no pixel was asked for


def test_distances():
    layers = [AttendedDistance(n, f"blocks.{n}", 10 * n + 10 * noise(4, seed=n), 30.0) for n in (1, 2, 3)]
    figure = plot_attended_distance(layers, title="some heads")
    check(figure, ["some heads"], "layer", "mean attended distance (pixels)")
    (axis,) = figure.axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    for line, entry in zip(dots, layers, strict=True):
        np.testing.assert_allclose(line.get_ydata(), entry.pixels)
        assert set(line.get_xdata()) == {entry.layer}
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["a head", "mean of heads", "attention to all patches alike"]


@pytest.mark.parametrize("names", [NAMES, MANY], ids=len)
def test_projection(names):
    few = len(names) <= 5
    projections = {
        f"head.learners.{n}": project(noise(len(names), 8, seed=n) - 0.5, centre=n > 0) for n in range(3 if few else 1)
    }
    figure = plot_projection(projections, names, title="embeddings")
    written = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    titles = [
        f"learner {n + 1}" + ("" if few else f": 150 classes, {len(texts)} named") for n, texts in enumerate(written)
    ]
    check(figure, titles, "component 1 (", "component 2 (")
    assert figure.axes[0].get_xlabel().endswith("% of the sum of squares)")
    if few:
        assert figure.axes[1].get_xlabel().endswith("% of the variance)")
        assert [len(texts) for texts in written] == [5, 5, 5]
    for axis, texts, projection in zip(figure.axes, written, projections.values(), strict=True):
        np.testing.assert_allclose(np.column_stack(axis.lines[-1].get_data()), projection.points)
        assert len(set(texts)) == len(texts) >= 5
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
        for text in axis.texts:
            np.testing.assert_allclose(text.xy, projection.points[names.index(text.get_text())])


@pytest.mark.parametrize("names", [NAMES, MANY], ids=len)
def test_similarity(names):
    similarities = {"head": cosine_similarity(noise(len(names), 8) - 0.5)}
    figure = plot_similarity(similarities, names)
    check(figure, ["head"], "class", "class")
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == (names if len(names) == 5 else names[::4])
    shown = figure.axes[0].images[0]
    assert shown.get_cmap().name == "PuOr"
    low, high = shown.get_clim()
    assert (
        -low == high == pytest.approx((similarities["head"] - torch.eye(len(names)) * 9).abs().fill_diagonal_(0).max())
    )


def trajectory(steps: int) -> Trajectory:
    points = torch.stack([noise(5, 9, 2) * 0.6**n for n in range(steps + 1)])
    spread = torch.tensor([0.6**n for n in range(steps + 1)])
    return Trajectory("head.shifts.1", points, torch.tensor([0.5, 0.25]), spread, (8.0, 8.0))


@pytest.mark.parametrize(
    ("steps", "shown", "labels"),
    [
        (1, [0, 1], None),
        (4, [0, 1, 2, 3, 4], labels_of(5)[4::8, 4::8]),
        (8, [0, 2, 4, 6, 8], labels_of(5)),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_trajectory(steps, shown, labels):
    way = trajectory(steps)
    figure = plot_trajectory(way, labels, NAMES if labels is not None else ())
    titles = [f"after shift {n}" if n else "no shift" for n in shown]
    check(figure, [*titles, "spread"], "component 1 (50 % of the variance)", "component 2 (25 %)")
    assert figure._suptitle.get_text() == "tokens under mean shift (shift of level 2)"
    limits = {(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes[:-1]}
    assert len(limits) == 1
    for axis, step in zip(figure.axes, shown, strict=False):
        np.testing.assert_allclose(axis.collections[0].get_offsets(), way.points[step].flatten(0, 1))
    spread = figure.axes[-1]
    assert (spread.get_xlabel(), spread.get_ylabel()) == ("shifts", "rms distance from the mean (features)")
    np.testing.assert_allclose(spread.lines[0].get_ydata(), way.spread)
    if labels is not None:
        of_tokens = labels[4::8, 4::8][:5, :9] if labels.shape == (H, W) else labels
        colours = figure.axes[0].collections[0].get_facecolor()[:, :3]
        np.testing.assert_allclose(colours, [COLOURS[k] for k in of_tokens.flatten().tolist()])


def test_steps_that_are_drawn_are_spread_evenly():
    assert [_chosen_steps(last) for last in (0, 3, 5, 100)] == [
        [0],
        [0, 1, 2, 3],
        [0, 1, 2, 4, 5],
        [0, 25, 50, 75, 100],
    ]


def test_affinity():
    rows = [
        Affinity(f"head.shifts.{n}", torch.softmax(noise(5, 9, seed=n).flatten(), 0).view(5, 9), (8.0, 8.0))
        for n in (0, 1)
    ]
    figure = plot_affinity(rows, noise(3, H, W), (0, 69))
    titles = [shown_title(f"affinity, shift of level {n + 1}", rows[n].weights) for n in (0, 1)]
    check(figure, ["image", *titles], "x (pixels)", "y (pixels)")


@pytest.mark.parametrize("truth", [False, True])
def test_labels_by_shift(truth):
    labels = torch.stack([labels_of(5, seed) for seed in range(3)])
    true = labels[1].clone() if truth else None
    if truth:
        true[:, :7] = 255
    figure = plot_labels_by_shift(LabelsByShift((0, 1, 4), labels, 1), noise(3, H, W), NAMES, true)
    titles = []
    for n, count in enumerate((0, 1, 4)):
        differ = 100 * (labels[n] != labels[1]).float().mean().item()
        parts = ["the model's own"] if n == 1 else [f"{differ:.1f} % differ"]
        if truth:
            parts.append(f"{100 * (labels[n] == labels[1])[:, 7:].float().mean().item():.1f} % right")
        titles.append(f"{count} shift{'s' * (count != 1)}\n{', '.join(parts)}")
    check(figure, ["image", *(["truth"] if truth else []), *titles], "x (pixels)", "y (pixels)")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [*NAMES, *(["(ignored)"] if truth else [])]
    assert {text.get_text() for text in figure.axes[-1].texts} == set(NAMES)  # written on the map, too


@pytest.mark.parametrize(("names", "truth"), [(NAMES, True), (MANY, False)], ids=["truth", "150 classes"])
def test_disagreement(names, truth):
    K = len(names)
    first, second, true = labels_of(K, 0), labels_of(K, 2), labels_of(K, 4)
    true[:4] = 255
    found = compare_labels(first, second, K, true if truth else None)
    figure = plot_disagreement(found, noise(3, H, W), names, ("one", "two"))
    share = 100 * found.differs.float().mean().item()
    panels = ["image", "one", "two", f"{share:.1f} % of the pixels differ", "one / two"]
    check(figure, panels, ("x (pixels)", "pixels of the image (percent)"), "y (pixels)")
    legend = [text.get_text() for text in figure.axes[4].get_legend().get_texts()]
    if truth:
        assert legend[0] == f"both right: {100 * found.shares[0]:.1f} %"
        assert legend[1].startswith("only one right: ")
        assert legend[-1] == "(ignored)"
    else:
        assert legend == ["the same", "not the same"]
    bars = figure.axes[5]
    apart = found.pairs.clone().fill_diagonal_(0)
    assert bars.patches[0].get_width() == pytest.approx(100 * apart.max().item())
    most = {f"{names[a]} / {names[b]}" for a, b in (apart == apart.max()).nonzero().tolist()}
    assert bars.get_yticklabels()[0].get_text() in most
    assert bars.get_ylabel() == "labels of the two"


def test_models_that_agree_everywhere():
    found = compare_labels(labels_of(5), labels_of(5), 5)
    titles = ["image", "first", "second", "0.0 % of the pixels differ", "first / second"]
    figure = plot_disagreement(found, noise(3, H, W), NAMES)
    assert [axis.get_title() for axis in figure.axes if axis.axison] == titles
    pixels(figure)


def test_colours_of_few_classes_stay_the_same():
    colours = ClassColours([torch.tensor([[3, 3, 1, 255]])], NAMES)
    assert sorted(colours.frequent) == [1, 3]
    np.testing.assert_allclose(
        colours.of(torch.tensor([[3, 1, 255, -1]]))[0], [OKABE_ITO[3], OKABE_ITO[1], (1, 1, 1), (1, 1, 1)]
    )
    assert len(set(COLOURS)) == 16


def test_colours_of_many_classes():
    labels = torch.cat([torch.full((150 - k,), k) for k in range(100)])  # 0 the most frequent
    colours = ClassColours([labels], MANY)
    assert (colours.frequent, colours.rarer) == (list(range(16)), 84)
    shown = colours.of(torch.arange(17))
    assert len(np.unique(shown, axis=0)) == 17
    np.testing.assert_allclose(shown[16], colours.of(torch.tensor(99)))
    figure = Figure()
    colours.legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*MANY[:16], "84 rarer classes"]
    palette = [(k, 0, 255) for k in range(150)]
    own = ClassColours([labels], MANY, palette)
    np.testing.assert_allclose(own.of(torch.tensor([7])), [(7 / 255, 0, 1)])
    figure = Figure()
    own.legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*MANY[:24], "and 76 more"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_attention([], noise(3, H, W)), "needs one map or more; got none"),
        (lambda: plot_attention(maps(1), noise(H, W)), r"picture must be \(3, H, W\), .* got \(40, 70\)"),
        (lambda: plot_attention(maps(1), 4 * noise(3, H, W) - 2), "values from 0 to 1, before .* got -2 to 2"),
        (lambda: plot_attended_distance([]), "needs one layer or more; got none"),
        (lambda: plot_projection({}, NAMES), "needs those of one head or more; got none"),
        (lambda: plot_projection({"head": project(noise(4, 3))}, NAMES), "names must be .* got 5 for 4 of head"),
        (lambda: plot_similarity({"head": torch.eye(6)}, NAMES), "names must be .* got 5 for 6 of head"),
        (lambda: plot_trajectory(trajectory(1), labels_of(5)), "labels need names, one for each class; got none"),
        (lambda: plot_trajectory(trajectory(1), torch.zeros(3, 3), NAMES), r"the 5 x 9 tokens or .* got \(3, 3\)"),
        (lambda: plot_affinity([], noise(3, H, W), (0, 0)), "needs one or more; got none"),
        (
            lambda: plot_labels_by_shift(LabelsByShift((1,), labels_of(5)[None], 1), noise(3, 9, W), NAMES),
            r"picture must be of the labels' size \(40, 70\); got \(9, 70\)",
        ),
        (
            lambda: plot_labels_by_shift(
                LabelsByShift((1,), labels_of(5)[None], 1), noise(3, H, W), NAMES, torch.zeros(2, 2)
            ),
            r"truth must be of the labels' size \(40, 70\); got \(2, 2\)",
        ),
        (
            lambda: plot_disagreement(compare_labels(labels_of(5), labels_of(5), 6), noise(3, H, W), NAMES),
            "names must be as many as the classes; got 5 for 6",
        ),
        (lambda: ClassColours([labels_of(5)], NAMES, [(0, 0, 0)]), "a colour for each of 5 classes; got 1"),
    ],
)
def test_what_cannot_be_drawn(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
