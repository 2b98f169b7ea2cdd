"""The parts of the page in Gradio, loaded when it is made: what is dropped, set and saved, around our viewer."""

import dataclasses
import html
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from segheads.data.images import ImageForm, read_image, to_rgb
from segheads.errors import DataError
from segheads.page.controls import BANDWIDTHS, THRESHOLDS, Controls
from segheads.page.views import Viewer, save, words_of
from segheads.prediction import Prediction

SESSIONS = 16  # tabs whose last image is kept
KEPT_FOR, CHECKED_EVERY = 12 * 3600, 600  # seconds: uploads in the temporary folder
MOST_EXAMPLES, THUMBNAIL = 24, 160
VIEWER = Path(__file__).with_name("viewer")
DOWNLOAD = """(file) => {
  const link = Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name });
  document.body.append(link);
  link.click();
  link.remove();
}"""
log = logging.getLogger(__name__)


def build_page(viewer: Viewer, *, title: str, examples: Sequence[Path], folder: Path) -> Any:
    """The page, whose events wait for the model one after the other.

    Args:
        viewer: The model.
        title: Name of the model.
        examples: Image files to choose from; those that cannot be read are left out.
        folder: Where files to download are written.
    """
    import gradio as gr

    pictures = _thumbnails(examples, viewer.predictor.model.image_form)
    deletes = (CHECKED_EVERY, KEPT_FOR)
    quiet: Any = {"analytics_enabled": False, "delete_cache": deletes, "fill_width": True}
    with gr.Blocks(title=f"{title} · segheads", **quiet) as page:
        path, found = gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                gr.HTML(f"<h1>{html.escape(title)}</h1>")
                file = gr.File(label="Image", height=150)
                gallery = _gallery(pictures) if pictures else None
                controls = _controls(viewer.controls)
            with gr.Column(scale=4, min_width=320):
                drawing = _drawing()
        _save_on_demand(drawing, found, path, folder)

        def look(image: str | None, *values: Any) -> tuple[Any, Any, Any]:
            if image is None:
                return gr.skip(), gr.skip(), gr.skip()
            answer, prediction = viewer.answer(Path(image), dict(zip(controls, values, strict=True)))
            return (answer, gr.skip(), gr.skip()) if prediction is None else (answer, prediction, image)

        def look_at_example(event: gr.SelectData, *values: Any) -> tuple[Any, Any, Any]:
            return look(str(list(pictures)[event.index]), *values)

        looks: Any = {"outputs": [drawing, found, path], "concurrency_limit": 1, "concurrency_id": "model"}
        looks |= {"api_visibility": "private", "trigger_mode": "always_last", "show_progress_on": drawing}
        settings = list(controls.values())
        file.upload(look, [file, *settings], **looks)
        if gallery is not None:
            gallery.select(look_at_example, settings, **looks)
        for control in settings:
            control.input(look, [path, *settings], **looks)
    page.state_session_capacity = SESSIONS
    return page


def _thumbnails(examples: Sequence[Path], form: ImageForm) -> dict[Path, Image.Image]:
    """A small picture of each example that can be read."""
    found: dict[Path, Image.Image] = {}
    for path in examples[:MOST_EXAMPLES]:
        try:
            picture = to_rgb(read_image(path, dataclasses.replace(form, exif="apply")))
        except DataError as error:
            log.warning("left out of the examples: %s", error)
            continue
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        found[path] = picture
    return found


def _gallery(pictures: dict[Path, Image.Image]) -> Any:
    import gradio as gr

    named: Any = [(picture, path.name) for path, picture in pictures.items()]
    return gr.Gallery(named, show_label=False, columns=2, height=230, allow_preview=False, buttons=[])


def _controls(controls: Controls) -> dict[str, Any]:
    """What the model lets people change, by the names of `Choice`."""
    import gradio as gr

    found: dict[str, Any] = {}
    if controls.layers is not None:
        own = ", ".join(dict.fromkeys(f"{bandwidth:.3g}" for bandwidth in controls.bandwidths))
        layers, (low, high) = controls.layers, BANDWIDTHS
        found["layers"] = gr.Slider(
            0, controls.most_layers, layers, step=1, label="Mean shift layers", info=f"own: {layers}"
        )
        found["bandwidth"] = gr.Slider(low, high, 1, step=0.05, label="Bandwidth factor", info=f"own: {own}")
    if len(controls.built_levels) > 1:
        levels: Any = [(f"level {level}", level) for level in controls.built_levels]
        own_levels: Any = [*controls.levels]
        found["levels"] = gr.CheckboxGroup(levels, value=own_levels, label="Learners", info="level 0 is the finest")
        found["merge"] = gr.Dropdown([*controls.merges], value=controls.merge, label="Merge", filterable=False)
    if controls.threshold is not None:
        low, high = THRESHOLDS
        found["threshold"] = gr.Slider(low, high, controls.threshold, step=0.01, label="Threshold")
    return found


def _drawing() -> Any:
    """The viewer, whose files lie beside this one."""
    import gradio as gr

    parts = (VIEWER.with_suffix(f".{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js"))
    template, style, script = parts
    return gr.HTML(html_template=template, css_template=style, js_on_load=script, apply_default_css=False)


def _save_on_demand(drawing: Any, found: Any, path: Any, folder: Path) -> None:
    """Write a PNG when the viewer asks for one, and hand it to the browser."""
    import gradio as gr

    saved = gr.File(visible="hidden", interactive=False)

    def write(event: gr.EventData, prediction: Prediction | None, image: str | None) -> str:
        try:
            return str(save(prediction, folder, image, **event._data))
        except Exception as error:
            raise gr.Error(words_of(error), print_exception=False) from error

    event = drawing.save(write, [found, path], saved, api_visibility="private", show_progress="hidden")
    event.success(None, saved, js=DOWNLOAD)
