"""The notebooks of docs/notebooks run as they stand, at small sizes; what is stored of them is whole and of no machine.

`python tests/test_notebooks.py [NAME ...]` runs them, or those named, at full size and stores what they show.
"""

import os
import re
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
TIME_LIMIT = 300  # seconds; a free core takes about 15
LARGEST = 250_000  # bytes
SMALL = {  # in place of the numbers in the cell that is tagged "parameters"
    "a_head_on_your_own_backbone": {"ITERATIONS": 2},
    "choose_a_head_by_probing": {"ITERATIONS": 2, "SEEDS": 1},
    "export_and_serve": {"ITERATIONS": 2},
    "look_inside_mean_shift": {"ITERATIONS": 2, "IMAGES": 4},
    "train_on_your_own_folder": {"ITERATIONS": 2},
}
# Lines by which a kernel shows that it is this Python with this checkout
PROBE = "import sys, segheads\nprint(sys.executable, segheads.__file__, sep='|')"
MACHINE = re.compile(r"/(home|root|tmp|Users|private|var|opt|mnt|work|workspace)/|[A-Z]:\\+Users", re.IGNORECASE)
PICTURE = re.compile(r"base64,[\w+/=]+")


@EACH
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures
    notebook = nbformat.read(path, as_version=4)
    make_small(notebook, SMALL[path.stem])
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    run(notebook, tmp_path, TIME_LIMIT)
    kernel = notebook.cells[-1].outputs[0].text.strip().split("|")
    assert kernel == [sys.executable, str(ROOT / "segheads" / "__init__.py")]


@EACH
def test_a_stored_notebook_is_whole(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not MACHINE.findall(PICTURE.sub("", str([text_of(output) for output in outputs])))
    assert path.stat().st_size < LARGEST
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_the_page_lists_every_notebook():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(notebooks/([\w-]+)\.ipynb\)", page)) == [path.stem for path in NOTEBOOKS]
    assert sorted(SMALL) == [path.stem for path in NOTEBOOKS]


def test_small_sizes_are_those_of_the_cell_of_parameters():
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("SIZE = 300  # of all\nOTHER = 1", metadata={"tags": ["parameters"]})]
    make_small(notebook, {"SIZE": 2})
    assert notebook.cells[0].source == "SIZE = 2  # of all\nOTHER = 1"
    with pytest.raises(AssertionError, match="AGE"):
        make_small(notebook, {"AGE": 2})


def make_small(notebook, values):
    """Give names in the cell that is tagged "parameters" other values."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^{name} = \w+", f"{name} = {value}", cell.source)
        assert count == 1, f"no line sets {name}"


def text_of(output):
    """What an output says; pictures are no text."""
    shown = output.get("data", {})
    return [output.get("text", ""), [value for kind, value in shown.items() if not kind.startswith("image/")]]


def environment(folder):
    """Where Jupyter and its kernel write, and from where the kernel imports segheads."""
    found = {f"JUPYTER_{kind}_DIR": str(folder / "jupyter") for kind in ("CONFIG", "DATA", "RUNTIME")}
    found |= {"JUPYTER_PLATFORM_DIRS": "1", "JUPYTER_NO_CONFIG": "1"}  # without the first, Jupyter warns
    found |= {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm's, where there is no ipywidgets
    found |= {"IPYTHONDIR": str(folder / "ipython"), "TMPDIR": str(folder)}
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def run(notebook, folder, seconds):
    """Run all cells in a kernel of this Python; the notebook has what they show afterwards.

    The kernel is ended, also where a cell raises or the time is up.
    """
    from nbclient import NotebookClient  # reads the environment

    end = time.monotonic() + seconds
    NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout_func=lambda cell: max(1, round(end - time.monotonic())),
        record_timing=False,
    ).execute()


def shrink_pictures(notebook):
    """Give figures a palette of 256 colours, with which they take a third of the room."""
    for output in [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]:
        shown = output.data.get("image/png")
        if shown and "text/html" not in output.data:
            file = BytesIO()
            Image.open(BytesIO(b64decode(shown))).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
            output.data["image/png"] = b64encode(file.getvalue()).decode()


def store(names):
    """Run notebooks at full size and keep what they show."""
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ.update(environment(Path(folder)))
            notebook = nbformat.read(path, as_version=4)
            run(notebook, folder, 10 * TIME_LIMIT)
        notebook.metadata.language_info = {"name": "python"}  # of any version
        shrink_pictures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    store(sys.argv[1:])
