"""Draw what a trained model looks at: attention, class embeddings, mean shift, and where two models disagree.

    segheads analyse --model runs/demo --image 3 --pixel 60 40
    segheads analyse --model runs/segmenter_ade20k --other runs/meanshifter_ade20k --image 120 --class-name sky

`--model` is the folder of a run, or of a model alone (`SegmentationModel.save_pretrained`), or a name on the hub. A run
knows its data set; for a model alone `--dataset` says it. Images are of the validation set.

`--output` ends up with those of these pictures that fit the model; a line says why the others are left out.
  attention_encoder.png      where the patch at the pixel looks, in each layer of the backbone, mean over heads
  attention_heads.png        the same for each head, in three layers
  attended_distance.png      how far each head of each layer looks, over several images
  attention_head.png         where the patch looks in a mask transformer
  attention_class.png        where a class looks in a mask transformer or a class attention
  class_embeddings.png       principal components of the class embeddings or of a linear head's weight
  class_similarity.png       their cosine similarity
  shift_affinity.png         what the token at the pixel is shifted towards
  shift_trajectory*.png      the tokens after each shift, in one plane
  shift_labels.png           label maps with 0 to 4 shifts
  disagreement.png           with --other: where the two models differ, and who is right
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from segheads import SegmentationModel
from segheads.analysis import (
    attended_distance,
    class_attention,
    class_embeddings,
    compare_labels,
    cosine_similarity,
    encoder_attention,
    head_attention,
    labels_by_shift,
    plot_affinity,
    plot_attended_distance,
    plot_attention,
    plot_disagreement,
    plot_labels_by_shift,
    plot_projection,
    plot_similarity,
    plot_trajectory,
    project,
    shift_affinity,
    shift_trajectories,
)
from segheads.data import DataConfig, SegmentationDataset, open_dataset, resize_keep_ratio, to_input
from segheads.data.config import in_new_words
from segheads.data.dataset import read_sample
from segheads.drawing import save_figure
from segheads.errors import OptionError
from segheads.ranges import SEED_LIMIT, Range
from segheads.run_config import read_run_config

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to look at, and where to draw it."""

    model: str
    """Folder of a run, or of a model alone, or a name on the Hugging Face hub."""
    other: str | None = None
    """A second one, for the picture of where the two disagree."""
    output: Path = Path("runs/analysis")
    """Folder of the pictures."""

    # The data; None means what the run was trained with
    dataset: str | None = None
    """Any of segheads.data.DATASETS: a published data set, scenes drawn by the code, or a folder of your own."""
    data_root: Path | None = None
    """Where the data set lies."""
    image_suffix: str | None = None
    """What follows the common name in the files of your own images."""
    label_suffix: str | None = None
    """What follows it in those of your own labels."""
    class_names: tuple[str, ...] | None = None
    """The classes of your own folder."""
    num_classes: Annotated[int | None, Range(1)] = None
    """How many classes your own folder has, in place of their names."""
    ignore_index: Annotated[int | tuple[int, ...] | None, Range(-(2**31), 2**31 - 1)] = None
    """The values in your own label files that mean no class, one or several."""
    label_values: Annotated[tuple[int, ...] | None, Range(0, 2**31 - 1)] = None
    """The value of each class in your own label files."""
    label_map: Path | None = None
    """A JSON file of value to class in your own label files."""
    label_colours: Path | None = None
    """A JSON file of colour to class in your own label files."""
    reduce_zero_label: bool | None = None
    """In your own label files 0 means no class and 1 is the first class."""
    scenes_size: Annotated[int | None, Range(1)] = None
    """Side of the drawn scenes, pixels."""
    seed: Annotated[int | None, Range(0, SEED_LIMIT)] = None
    """Of the drawn scenes."""
    scale: Annotated[tuple[int, int] | None, Range(1)] = None
    """Longest and shortest side, pixels, into which images are resized."""

    # What to look at
    image: Annotated[int, Range(0)] = 0
    """Index of the image in the validation set."""
    pixel: Annotated[tuple[int, int] | None, Range(0)] = None
    """Row and column (y, x) of the pixel whose patch is asked, in the resized image; None means its middle."""
    class_name: str | None = None
    """The class that is asked where it looks; None means the one that the model sees at the pixel."""
    shifts: Annotated[int, Range(0)] = 4
    """The most shifts in the pictures of mean shift."""
    distance_images: Annotated[int, Range(1)] = 8
    """Over how many images the attended distance is taken."""
    dataset_colours: bool = False
    """Colour classes as the data set does, rather than so that the colour-blind can tell them apart."""
    device: str = "cpu"
    """Where the model runs, such as cuda."""


GROUPS = {
    "data": (
        "What the images are; None means what the run was trained with.",
        (
            *("dataset", "data_root", "image_suffix", "label_suffix", "class_names", "num_classes", "ignore_index"),
            *("label_values", "label_map", "label_colours", "reduce_zero_label", "scenes_size", "seed", "scale"),
        ),
    ),
    "look": (
        "What is looked at, and how it is drawn.",
        ("image", "pixel", "class_name", "shifts", "distance_images", "dataset_colours", "device"),
    ),
}


@dataclass(frozen=True)
class Data:
    """The data set, the size into which its images are resized, and the seed of drawn scenes."""

    config: DataConfig
    scale: tuple[int, int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """One image: as a picture in [0, 1], and its labels at the same size."""

    picture: Tensor
    truth: Tensor
    name: str


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked about."""

    config: Config
    model: SegmentationModel
    dataset: SegmentationDataset
    data: Data
    sample: Sample
    image: Tensor
    """The picture as the model wants it."""
    seen: Tensor
    """The model's labels of it."""
    pixel: tuple[int, int]
    label: int
    """The class that is asked."""

    @property
    def palette(self) -> Any:
        """The data set's colours, if these are wanted."""
        return self.dataset.palette if self.config.dataset_colours else None


def main(config: Config) -> None:
    """Draw what fits the model."""
    subject = find_subject(config)
    config.output.mkdir(parents=True, exist_ok=True)
    seen_there = subject.dataset.class_names[int(subject.seen[subject.pixel])]
    log.info("%s, where the model sees %s at pixel %d %d", subject.sample.name, seen_there, *subject.pixel)
    draw = Drawer(config.output)
    for draw_some in (draw_attention, draw_embeddings, draw_shifts, draw_disagreement):
        draw_some(draw, subject)
    for reason, left_out in draw.left_out.items():
        log.info("  without %s: %s", ", ".join(left_out), reason)
    log.info("pictures are in %s", config.output)


def find_subject(config: Config) -> Subject:
    """The model, the image, and what is asked of them."""
    model = load_model(config.model, config.device)
    data = data_of(config)
    dataset = load_dataset(data, model, config.model)
    sample = read(dataset, config.image, data.scale)
    image = normalised(model, sample.picture, config.device)
    H, W = sample.picture.shape[1:]
    pixel = config.pixel or (H // 2, W // 2)
    if not (0 <= pixel[0] < H and 0 <= pixel[1] < W):
        raise OptionError(f"--pixel must be inside the image of {H} x {W} pixels; got {pixel[0]} {pixel[1]}")
    seen = model.predict(image[None])[0]
    label = named_class(config.class_name, dataset) if config.class_name else int(seen[pixel])
    return Subject(config, model, dataset, data, sample, image, seen, pixel, label)


def draw_attention(draw: "Drawer", of: Subject) -> None:
    """Where patches and classes look."""
    model, image, picture, pixel = of.model, of.image, of.sample.picture, of.pixel
    title = f"class {of.dataset.class_names[of.label]}"
    draw("attention_encoder", lambda: plot_attention(encoder_attention(model, image, pixel), picture, pixel))
    draw("attention_heads", lambda: plot_heads(model, image, picture, pixel))
    draw("attended_distance", lambda: plot_distance(model, of.dataset, of.data.scale, of.config))
    draw("attention_head", lambda: plot_attention(head_attention(model, image, pixel), picture, pixel))
    draw("attention_class", lambda: plot_attention(class_attention(model, image, of.label), picture, title=title))


def draw_embeddings(draw: "Drawer", of: Subject) -> None:
    """Class embeddings, and how similar they are."""
    names = of.dataset.class_names
    draw(
        "class_embeddings",
        lambda: plot_projection({head: project(x) for head, x in class_embeddings(of.model).items()}, names),
    )
    draw(
        "class_similarity",
        lambda: plot_similarity({head: cosine_similarity(x) for head, x in class_embeddings(of.model).items()}, names),
    )


def draw_shifts(draw: "Drawer", of: Subject) -> None:
    """Where tokens are shifted, and what each shift makes of the labels."""
    model, image, sample, names, shifts = of.model, of.image, of.sample, of.dataset.class_names, of.config.shifts

    def trajectories() -> list[Figure]:
        ways = shift_trajectories(model, image, shifts)
        return [plot_trajectory(way, of.seen.cpu(), names, palette=of.palette) for way in ways]

    def labels() -> Figure:
        by_shift = labels_by_shift(model, image, range(shifts + 1))
        return plot_labels_by_shift(by_shift, sample.picture, names, sample.truth, palette=of.palette)

    draw("shift_affinity", lambda: plot_affinity(shift_affinity(model, image, of.pixel), sample.picture, of.pixel))
    draw.several("shift_trajectory", trajectories)
    draw("shift_labels", labels)


def draw_disagreement(draw: "Drawer", of: Subject) -> None:
    """Where another model sees other classes, and who is right."""
    if of.config.other is None:
        return
    other, device, ignored = load_model(of.config.other, of.config.device), of.config.device, of.dataset.ignore_index
    check_classes(other, of.dataset, of.config.other)
    labels = other.predict(normalised(other, of.sample.picture, device)[None])[0]
    found = compare_labels(of.seen.cpu(), labels.cpu(), of.model.num_labels, of.sample.truth, ignore_index=ignored)
    titles, names = (Path(of.config.model).name, Path(of.config.other).name), of.dataset.class_names
    draw("disagreement", lambda: plot_disagreement(found, of.sample.picture, names, titles, palette=of.palette))


class Drawer:
    """Draws figures into a folder, and keeps why others do not fit the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: dict[str, list[str]] = {}  # reason to names

    def __call__(self, name: str, figure: Callable[[], Figure]) -> None:
        """Draw one figure."""
        self.several(name, lambda: [figure()])

    def several(self, name: str, figures: Callable[[], list[Figure]]) -> None:
        """Draw figures; of more than one, numbers are added to the name."""
        try:
            drawn = figures()
        except ValueError as error:
            self.left_out.setdefault(str(error), []).append(name)
            return
        for number, figure in enumerate(drawn, 1):
            path = self.folder / (f"{name}.png" if len(drawn) == 1 else f"{name}_{number}.png")
            save_figure(figure, path)
            log.info("  %s", path.name)


def plot_heads(model: SegmentationModel, image: Tensor, picture: Tensor, pixel: tuple[int, int]) -> Figure:
    """Every head of the first, the middle and the last layer."""
    maps = encoder_attention(model, image, pixel)
    chosen = sorted({0, (len(maps) - 1) // 2, len(maps) - 1})
    return plot_attention([maps[index] for index in chosen], picture, pixel, per_head=True)


def plot_distance(
    model: SegmentationModel, dataset: SegmentationDataset, scale: tuple[int, int], config: Config
) -> Figure:
    """Attended distance over the first images of the size of the very first."""
    batch: list[Tensor] = []
    for index in range(min(config.distance_images, len(dataset))):
        picture = read(dataset, index, scale).picture
        if not batch or picture.shape == batch[0].shape:
            batch.append(normalised(model, picture, config.device))
    distances = attended_distance(model, torch.stack(batch))
    size = "x".join(str(side) for side in batch[0].shape[1:])
    return plot_attended_distance(distances, title=f"how far heads look ({len(batch)} images of {size} pixels)")


def load_model(name: str, device: str) -> SegmentationModel:
    """The model of a run, of a folder or of the hub."""
    folder = Path(name) / "model"
    model = SegmentationModel.from_pretrained(folder if folder.is_dir() else name)
    if not model.image_form.is_rgb:
        raise OptionError(f"analyse takes models of images of 3 channels and 8 bit; {name} is of {model.image_form}")
    return model.to(device)


def data_of(config: Config) -> Data:
    """The data of the run, but for what the command line says."""
    values: dict[str, Any] = {"reduce_zero_label": False, **in_new_words(read_run_config(config.model))}
    values = {name: values[name] for name in DATA_FIELDS if values.get(name) is not None}
    if config.dataset not in (None, values.get("dataset")):
        values = {"scale": values["scale"]} if "scale" in values else {}  # the rest is of another data set
    values |= {name: getattr(config, name) for name in DATA_FIELDS if getattr(config, name) is not None}
    if "dataset" not in values:
        raise OptionError(f"{config.model} is no run that knows its data; say which with --dataset")
    longest, shortest = values.get("scale", (2048, 512))
    return Data(DataConfig.from_json(values), (longest, shortest), values.get("seed", 0))


def load_dataset(data: Data, model: SegmentationModel, name: str) -> SegmentationDataset:
    """The validation set, whose classes must be the model's."""
    dataset = open_dataset(data.config, "val", seed=data.seed)
    check_classes(model, dataset, name)
    return dataset


def check_classes(model: SegmentationModel, dataset: SegmentationDataset, name: str) -> None:
    """End the run where a model was trained for other classes."""
    if model.num_labels != dataset.num_classes:
        raise OptionError(
            f"{name} has {model.num_labels} classes, and the data set {dataset.num_classes}; "
            "give the one it was trained on with --dataset"
        )


def read(dataset: SegmentationDataset, index: int, scale: tuple[int, int]) -> Sample:
    """One image, resized as for evaluation, and its labels at that size."""
    if not 0 <= index < len(dataset):
        raise OptionError(f"--image must be 0 to {len(dataset) - 1}; got {index}")
    image, labels = read_sample(dataset, index)
    picture = to_input(resize_keep_ratio(image, scale), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long()  # the nearest
        for new, old in zip(picture.shape[1:], labels.shape, strict=True)
    )
    return Sample(picture, labels.long()[rows][:, columns], dataset.name(index))


def normalised(model: SegmentationModel, picture: Tensor, device: str) -> Tensor:
    """A picture as the model wants it."""
    mean, std = (torch.tensor(model.data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return ((picture - mean) / std).to(device)


def named_class(name: str, dataset: SegmentationDataset) -> int:
    """Index of a class."""
    if name not in dataset.class_names:
        raise OptionError(f"--class-name must be one of {', '.join(dataset.class_names)}; got {name!r}")
    return dataset.class_names.index(name)


# What a run's config.json knows about its data
DATA_FIELDS = {"scale", "seed", *(field.name for field in dataclasses.fields(DataConfig))}
DATA_FIELDS &= set(Config.__dataclass_fields__)
