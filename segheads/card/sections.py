"""What a card says, section by section."""

import shlex
from typing import TYPE_CHECKING

from segheads.card.record import PICTURES, Record
from segheads.card.text import code, escaped, fence, is_number, percent, placeless, table, words
from segheads.data import DATASETS
from segheads.version import VERSION

if TYPE_CHECKING:
    from segheads.model import SegmentationModel

NAME = "OWNER/NAME"  # until the model has one on the hub
WORST = 3  # classes that are named


def what(model: "SegmentationModel", record: Record) -> str:
    """Parts, size and mIoU."""
    head, backbone = parts(model)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    between = f" on the pyramid {code(model.plan.pyramid)}" if model.plan and model.plan.pyramid else ""
    score = record.scores.get("mIoU")
    reached = "" if score is None else f" Its mIoU is {percent(score)} % on {escaped(record.data)}."
    return (
        f"# {escaped(head)} on {escaped(backbone)}\n\nSemantic segmentation: each pixel of an image gets one of "
        f"{model.num_labels} [classes](#classes). The head {code(head)}{between} on timm's backbone "
        f"{code(backbone)}, {count:.2f} M parameters, of segheads {VERSION}.{reached}"
    )


def parts(model: "SegmentationModel") -> tuple[str, str]:
    """Names of head and backbone."""
    return model.plan.head if model.plan else type(model.head).__name__, model.backbone.name


def use(model: "SegmentationModel", record: Record) -> str:  # noqa: ARG001 (as its neighbours)
    """Three lines of Python, and a command."""
    lines = [
        "from segheads import Predictor",
        f'prediction = Predictor.from_pretrained("{NAME}")("photo.jpg")',
        'prediction.overlay().save("overlay.png")',
    ]
    return (
        f"## Use it\n\n{fence(lines, 'python')}\n\n`prediction.labels` has the class of each pixel. Images: "
        f"{escaped(str(model.image_form))}, any size. `segheads predict photos --model {NAME} --output labels` labels "
        f"a folder; `{NAME}@COMMIT` is one state of the model for good."
    )


def scores(model: "SegmentationModel", record: Record) -> str:
    """The scores, on what, and how images were shown."""
    results = record.results
    if not record.scores:
        return (
            "## Scores\n\nNot scored: nothing had been measured when this card was written. `segheads evaluate --model "
            f"{NAME} --dataset NAME` measures it."
        )
    told = results.get("protocol", model.protocol.in_words(is_single=model.num_classes == 1))
    count = told.get("images", results.get("images"))
    over = f"{count} images of {record.data}" if count else record.data
    after = f", after {results['iteration']} updates" if results.get("iteration") else ""
    absent = ", ".join(map(str, results.get("absent_classes") or ()))
    options = {key: x for key, x in told.items() if key not in ("model", "dataset", "split", "images")}
    found = [
        f"## Scores\n\nIn percent, on {escaped(over)} ({escaped(record.split)}){escaped(after)}.",
        table(list(record.scores), [[percent(x) for x in record.scores.values()]], left=0),
        f"mIoU leaves out the classes that do not occur: {escaped(absent)}." if absent else "",
        "How images were shown:",
        table(["option", "value"], [[escaped(key), escaped(words(x))] for key, x in options.items()], left=2),
    ]
    return "\n\n".join(filter(None, found))


def pictures(model: "SegmentationModel", record: Record) -> str:  # noqa: ARG001 (as its neighbours)
    """The pictures of the run, which lie beside the card."""
    shown = [f"{PICTURES[path.name]}:\n\n![{PICTURES[path.name]}]({path.stem}.jpg)" for path in record.pictures]
    return "\n\n".join(["## Pictures", *shown]) if shown else ""


def limits(model: "SegmentationModel", record: Record) -> str:
    """What it cannot do, as far as that is known."""
    other = "the background" if model.num_classes == 1 else "one of its classes"
    found = [f"Every pixel gets a label: what the model was never taught becomes {other}, without a warning."]
    rows = sorted((row for row in record.classes if is_number(row.get("IoU"))), key=lambda row: float(row["IoU"]))
    if len(rows) > WORST:
        named = ", ".join(f"{escaped(str(row['name']))} ({percent(row['IoU'])})" for row in rows[:WORST])
        found.append(f"It is worst at {named}; the numbers are IoU in percent.")
    if record.scores:
        found.append("The scores are of images like those it learned from; on others they can be much lower.")
    if record.run.get("best"):
        found.append("Its weights are the best of several on the images of the scores, which flatters the scores.")
    if record.dataset == "scenes":
        found.append("It learned from scenes that a program draws: it is a demonstration, and knows no photographs.")
    found.append("Nobody has tested here whether it is fair, or safe enough for any use.")
    return "\n".join(["## Limits\n", *(f"- {limit}" for limit in found)])


def training(model: "SegmentationModel", record: Record) -> str:  # noqa: ARG001 (as its neighbours)
    """What the run was, with its versions and its command."""
    run, about = record.run, record.about
    if not run:
        return ""
    count = ((run.get("contents") or {}).get("training_images") or [None])[0]
    tried = ", ".join(map(str, run.get("learning_rates") or ()))  # of a probe
    rate = f"the best of learning rates {tried}" if tried else f"learning rate {run.get('learning_rate')}"
    precision = run.get("mixed_precision")
    rows = {
        "images": f"{count} of {record.data}" if count else record.data,
        "updates": f"{run.get('iterations')}, of {run.get('batch_size')} images each",
        "crops": f"{words(run.get('crop_size'))} pixels",
        "backbone": "frozen" if tried else None,
        "optimizer": ", ".join(str(x) for x in (run.get("optimizer"), rate, run.get("schedule")) if x),
        "weight decay": run.get("weight_decay"),
        "loss": run.get("loss"),
        "precision": "fp32" if precision == "no" else precision,
        "seed": run.get("seed"),
        "devices": f"{about.get('processes', 1)} x {about.get('gpu') or 'CPU'}" if about else None,
        "versions": ", ".join(f"{name} {about[name]}" for name in ("segheads", "torch", "timm") if about.get(name)),
    }
    shown = [[key, escaped(str(x))] for key, x in rows.items() if x not in (None, "")]
    command = shlex.join(placeless(str(word)) for word in about.get("command") or ())
    started = f"\n\nThe command was\n\n{fence([command])}" if command else ""
    return f"## Training\n\n{table(['option', 'value'], shown, left=2)}{started}"


def terms(model: "SegmentationModel", record: Record) -> str:
    """Licences of weights, data and code, as far as they are known."""
    kind = DATASETS.get(record.dataset or "")
    if kind is not None and kind.terms:
        of_data = f"{escaped(record.data)} has [terms of its own]({kind.terms}), which may bind models, too."
    elif record.dataset == "scenes":
        of_data = "Its images were drawn by segheads."
    else:
        of_data = "The terms of the images that it learned from are not known here."
    found = [
        "The licence of these weights is in the field `license` of this page; without that, none was given.",
        escaped(record.origin(model.backbone)[0]),
        of_data,
        "The pictures show images of that data set." if "predictions.png" in {x.name for x in record.pictures} else "",
        "The code of segheads has the MIT licence, which says nothing about weights.",
    ]
    return "\n".join(["## Licence and terms\n", *(f"- {term}" for term in found if term)])


def classes(model: "SegmentationModel", record: Record) -> str:
    """A row for each class: its label, its name, what was measured of it."""
    names = model.classes.names if model.classes else [f"class {label}" for label in range(model.num_labels)]
    rows = record.classes if len(record.classes) == len(names) else [{} for _ in names]
    titles = [key for key in ("IoU", "Acc") if key in rows[0]]
    cells = [
        [str(label), escaped(name), *(percent(row.get(key)) for key in titles)]
        for label, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
    return f"## Classes\n\n{table(['label', 'class', *titles], cells, left=2)}"


SECTIONS = (what, use, scores, pictures, limits, training, terms, classes)
