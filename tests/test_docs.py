"""README and documentation: code runs as it stands, links lead somewhere, every public name is on an API page."""

import ast
import importlib
import inspect
import pkgutil
import re
import unicodedata
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import yaml

import segheads
from segheads import create_model
from segheads.data import DATASETS, Scenes
from segheads.exporting import FORMATS
from segheads.functional import KERNELS
from segheads.heads import HEADS
from segheads.losses import LOSSES
from segheads.merges import MERGES
from segheads.metrics import METRICS
from segheads.pyramids import PYRAMIDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
REGISTRIES = {
    "head": HEADS,
    "merge": MERGES,
    "data set": DATASETS,
    "pyramid": PYRAMIDS,
    "kernel": KERNELS,
    "loss": LOSSES,
    "metric": METRICS,
    "export format": FORMATS,
}
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), 1)
]


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory):
    """What the pages suppose to be there: a photo, and a run of the demo (here an untrained model)."""
    folder = tmp_path_factory.mktemp("newcomer")
    Scenes("val", size=(96, 96)).read(3)[0].save(folder / "photo.jpg")
    model = create_model("test_vit", "mean_shift", Scenes().num_classes, pretrained=False)
    model.save_pretrained(folder / "runs/demo/model")
    return folder


@pytest.fixture
def registries_restored():
    """Pages show how to register parts; other tests must not meet them."""
    before = [(registry, dict(registry)) for registry in REGISTRIES.values()]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("registries_restored")
@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, finished_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "runs"):
        (tmp_path / name).symlink_to(finished_demo / name)
    exec(compile(block, "code block", "exec"), {"__name__": "__main__"})


def test_commands_of_the_readme_are_there_for_ci():
    readme = (ROOT / "README.md").read_text()
    assert '\npip install -e ".[recipes]" && accelerate launch recipes/meanshifter_ade20k.py --demo\n' in readme
    assert '\npip install -e ".[test]" && pytest\n' in readme


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(example.splitlines()) <= 10
    assert len(readme.splitlines()) <= 80


@ALL_PAGES
def test_links_lead_somewhere(page):
    text = without_code(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        inside = page == ROOT / "README.md" or target.is_relative_to(DOCS)
        assert inside, f"{link} leaves docs/, where the built site has nothing"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


@ALL_PAGES
def test_references_to_code_lead_to_an_api_page(page):
    for name in re.findall(r"\]\[([\w.]+)\]", without_code(page.read_text())):
        parents = [name, *(name.rsplit(".", depth)[0] for depth in (1, 2))]  # a method stands with its class
        assert set(parents) & documented_names().keys(), f"no API page has ::: {name}"
        find(name)


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    entries = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(entries) == len(set(entries))
    assert set(entries) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@ALL_PAGES
def test_no_page_is_empty(page):
    text = without_code(page.read_text())
    assert re.match(r"# \S", text), "a page begins with its title"
    body = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    assert len(body.split()) >= 60 or ":::" in body, f"only {len(body.split())} words"
    assert not re.search(r"\b(TODO|FIXME|TBD|placeholder|lorem ipsum)\b", text, flags=re.IGNORECASE)
    assert not re.search(r"^[A-Z]{4,}$", text, flags=re.MULTILINE), "a word in capitals stands where a text should"


def test_every_picture_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    unused = [path.name for path in (DOCS / "images").iterdir() if f"images/{path.name})" not in text]
    assert not unused


PACKAGES = [
    module.name
    for module in pkgutil.walk_packages(segheads.__path__, "segheads.")
    if hasattr(importlib.import_module(module.name), "__all__")
]


@pytest.mark.parametrize("package", ["segheads", *PACKAGES])
def test_every_public_name_has_an_entry_on_an_api_page(package):
    entries = list(documented_names().values())
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    missing = [f"{package}.{name}" for name, value in public.items() if not any(value is entry for entry in entries)]
    assert not missing, "no API page has ::: for these"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REGISTRIES.items() for name in names])
def test_everything_registered_has_an_entry_on_an_api_page(kind, name):
    part = REGISTRIES[kind][name]
    part = part if callable(part) else type(part)
    assert any(part is entry for entry in documented_names().values())


@cache
def documented_names():
    """Every name that `:::` puts on an API page, with the object: the name itself and the members it lists, or of a
    module that lists none those that it exports or defines.

    Of a package without such a list, the page has what its `__all__` names, so that nothing can be forgotten.

    A function in a module of its name needs the full name (`segheads.functional.mean_shift.mean_shift`): as a member of
    the package it would be passed over without a warning.
    """
    names = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for name, options in re.findall(
            r"^::: (\S+)\n((?: {4}.*\n|\n(?= {4}))*)", page.read_text() + "\n", re.MULTILINE
        ):
            members = ((yaml.safe_load(options) or {}).get("options") or {}).get("members") or public_names(find(name))
            listed = {f"{name}.{member}": find(f"{name}.{member}") for member in members}
            names[name] = find(name)
            names |= {full: value for full, value in listed.items() if not inspect.ismodule(value)}
    shown = [name for name in segheads.heads.__all__ if f"segheads.heads.{name}" in names]
    return names | {f"segheads.{name}": names[f"segheads.heads.{name}"] for name in shown}  # links may use either


def public_names(module):
    """What mkdocstrings shows of a module as a whole: its `__all__`, or what it defines itself and describes."""
    if not inspect.ismodule(module):
        return []
    if hasattr(module, "__all__"):
        return list(module.__all__)
    found, before = [], ast.Pass()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.Expr) and isinstance(before, ast.AnnAssign | ast.Assign):
            targets = [before.target] if isinstance(before, ast.AnnAssign) else before.targets
            found += [target.id for target in targets]
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            found.append(node.name)
        before = node
    return [name for name in found if not name.startswith("_")]


def find(name):
    """The object of a dotted name; as for mkdocstrings, a module hides what its package calls by the same name."""
    first, *rest = name.split(".")
    value, path = importlib.import_module(first), first
    for part in rest:
        path += f".{part}"
        try:
            value = importlib.import_module(path)
        except ModuleNotFoundError:
            value = getattr(value, part)
    return value


def without_code(text):
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page):
    """What a link to a page may name after `#`: its headings, as Python-Markdown spells them, and its API entries."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", title).replace("`", "")
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.add(next(name for n in count() if (name := f"{slug}_{n}" if n else slug) not in found))
    return found | set(re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE))


def navigation(entries):
    """The pages of mkdocs.yml's nav, sections opened."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [value] if isinstance(value, str) else navigation(value)
