"""The page in Chromium, as people use it: pictures lie in the test's folder. Needs gradio, playwright and Chromium."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segheads import Predictor, create_model
from segheads.classes import Classes
from segheads.data import Scenes
from segheads.page.controls import Choice, changed

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ["Chromium"] * (CHROMIUM is None)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the page in a browser needs {', '.join(MISSING)}")
OWN = Choice()
NAMES = ("<b>sky</b>", "a & b", '"it\'s"', "tree 🌳", "x" * 300)
PATIENCE = 60_000  # milliseconds, on a busy machine
# In the server: who else is asked for
WATCH = """
import socket, os
def noted(original):
    def asked(*args, **options):
        if "127.0.0.1" not in str(args) and "::1" not in str(args) and "localhost" not in str(args):
            print(args, file=open(os.environ["ASKED"], "a", encoding="utf-8"))
        return original(*args, **options)
    return asked
socket.getaddrinfo = noted(socket.getaddrinfo)
"""
HEADS = {
    "mean_shift": ("test_vit", {"num_layers": 1, "kernel": "cosine", "learn_bandwidth": True}),
    "senformer": ("test_convnext", {"learner": "linear"}),
}


def make_model(folder, head):
    torch.manual_seed(0)
    backbone, options = HEADS[head]
    model = create_model(backbone, head, len(NAMES), pretrained=False, head_kwargs=options)
    model.classes = Classes(NAMES)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=list(HEADS))
def head(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, head):
    """A model, images good and bad, and a folder of pictures."""
    folder = tmp_path_factory.mktemp(head)
    make_model(folder / "model", head)
    for index in range(3):
        (folder / "photos").mkdir(exist_ok=True)
        Scenes("val", size=(96, 144)).read(index)[0].save(folder / "photos" / f"scene {index}.png")
    (folder / "broken.png").write_bytes((folder / "photos" / "scene 0.png").read_bytes()[:3000])
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.png")  # 1.5 MB
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Where the command serves the page; at the end Ctrl-C ends it in one line, and its folder of uploads is gone."""
    own = {"PYTHONPATH": f"{folder / 'watch'}:{ROOT}", "ASKED": str(folder / "asked"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    words = ["--model", "model", "--port", "0", "--examples", "photos", "--max-upload", "1", "--threads", "1"]
    command = [sys.executable, "-m", "segheads", "demo", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, **pipes)
    line = process.stdout.readline()
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1:] == ["stopped by SIGINT"], errors
    assert "Traceback" not in errors
    assert not (folder / "asked").exists(), (folder / "asked").read_text(encoding="utf-8")
    assert not list((folder / "tmp").glob("segheads-demo-*"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, address):
    """Opens tabs; what they ask of others is refused, and fails the test, and so do errors of scripts."""
    elsewhere, faults, contexts = [], [], []

    def guard(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        elsewhere.append(route.request.url)
        return route.abort()

    def opened(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.route("**/*", guard)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".viewer")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert (elsewhere, faults) == ([], [])


def upload(page, path):
    page.wait_for_selector("input[type=file], button[aria-label='Clear']", state="attached")
    if not page.locator("input[type=file]").count():  # a file is there
        page.locator("button[aria-label='Clear']").first.click()
    page.set_input_files("input[type=file]", path)


def look(page, path):
    upload(page, path)
    page.wait_for_selector(".viewer .main:visible")
    page.wait_for_function("name => document.querySelector('.stage img').alt === name", arg=path.name)


def download(page, kind, folder):
    with page.expect_download() as found:
        page.click(f".save[data-kind={kind}]")
    found.value.save_as(folder / found.value.suggested_filename)
    return folder / found.value.suggested_filename


def legend(page):
    return {b.get_attribute("title"): b for b in page.locator(".legend button").all()}


def shares(page):
    return page.locator(".legend em").all_inner_texts()


def expected(folder, path, choice=OWN):
    predictor = Predictor.from_pretrained(folder / "model")
    with changed(predictor.model, choice):
        return predictor(path)


def painted(page):
    """How many pixels of the canvas have a colour."""
    return page.locator(".stage canvas").evaluate(
        "canvas => { const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "return data.filter((value, k) => k % 4 == 3 && value).length }"
    )


def test_an_image_is_seen_read_toggled_and_saved(open_page, folder, tmp_path):
    page, path = open_page(), folder / "photos" / "scene 0.png"
    page.screenshot(path=tmp_path / "empty.png")
    look(page, path)
    found = expected(folder, path)
    assert list(legend(page)) == [area.name for area in found.areas]
    assert page.locator(".legend b").all_inner_texts() == [area.name for area in found.areas]  # no HTML of theirs

    box = page.locator(".stage").bounding_box()
    x, y = 40, 70
    page.mouse.move(box["x"] + (x + 0.5) / 144 * box["width"], box["y"] + (y + 0.5) / 96 * box["height"])
    name = NAMES[found.labels[y, x]]
    page.wait_for_selector(".tip:visible")
    assert page.inner_text(".tip").startswith(name)
    assert page.inner_text(".read").endswith(f"(x {x}, y {y})")
    page.screenshot(path=tmp_path / "seen.png", full_page=True)

    asked = []
    page.on("request", lambda request: asked.append(request.url))
    assert painted(page) == 96 * 144
    largest = found.areas[0]
    legend(page)[largest.name].click()
    assert legend(page)[largest.name].get_attribute("aria-pressed") == "false"
    assert painted(page) == 96 * 144 - largest.pixels
    page.locator(".opacity input").fill("80")
    assert page.locator(".stage canvas").evaluate("canvas => canvas.style.opacity") == "0.8"
    page.screenshot(path=tmp_path / "toggled.png", full_page=True)
    assert not asked, "the browser does all of this by itself"

    labels, overlay = (download(page, kind, tmp_path) for kind in ("labels", "overlay"))
    assert (labels.name, overlay.name) == ("scene 0_labels.png", "scene 0_overlay.png")
    found.save(tmp_path / "expected.png")
    assert labels.read_bytes() == (tmp_path / "expected.png").read_bytes()
    unpainted = (found.labels == largest.label).numpy()[..., None]
    wanted = np.where(unpainted, np.array(found.image), np.array(found.overlay(0.8)))
    with Image.open(overlay) as written:
        np.testing.assert_array_equal(np.array(written), wanted)


def test_settings_change_the_labels_and_come_back(open_page, folder, head, tmp_path):
    page, path = open_page(), folder / "photos" / "scene 1.png"
    before = json.dumps([path.read_bytes().hex() for path in sorted((folder / "model").iterdir())])
    look(page, path)
    own = shares(page)
    if head == "mean_shift":
        choice = Choice(layers=8)
        page.get_by_label("number input for Mean shift layers").fill("8")
        page.keyboard.press("Enter")
    else:
        choice = Choice(levels=(3,), merge="average")
        for level in range(3):
            page.get_by_label(f"level {level}", exact=True).uncheck()
    found = expected(folder, path, choice)
    wanted = [area.name for area in found.areas]
    page.wait_for_function(
        "names => [...document.querySelectorAll('.legend button')].map(x => x.title).join('|') === names",
        arg="|".join(wanted),
    )
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path / "set.png", full_page=True)
    found.save(tmp_path / "expected.png")
    assert download(page, "labels", tmp_path).read_bytes() == (tmp_path / "expected.png").read_bytes()

    other = open_page()  # a second tab has the model's own settings
    look(other, path)
    assert shares(other) == own
    assert before == json.dumps([path.read_bytes().hex() for path in sorted((folder / "model").iterdir())])


def test_settings_that_do_not_go_together_are_told(open_page, folder, head, tmp_path):
    if head != "senformer":
        pytest.skip("this model has no learners")
    page = open_page()
    look(page, folder / "photos" / "scene 0.png")
    for level in range(4):
        page.get_by_label(f"level {level}", exact=True).uncheck()
    page.wait_for_selector(".message:visible")
    assert page.inner_text(".message") == "choose one learner or more of the levels [0, 1, 2, 3]"
    page.get_by_label("level 1", exact=True).check()
    page.wait_for_selector(".message", state="hidden")


def test_files_that_are_no_images_are_told_and_nothing_is_lost(open_page, folder, tmp_path):
    page = open_page(color_scheme="dark")
    look(page, folder / "photos" / "scene 0.png")
    own = shares(page)
    upload(page, folder / "broken.png")
    page.wait_for_selector(".message:visible")
    assert page.inner_text(".message").startswith("broken.png (3000 bytes) cannot be read as an image: it is cut off")
    page.screenshot(path=tmp_path / "broken.png", full_page=True)
    upload(page, folder / "large.png")
    page.wait_for_selector("text=exceed the maximum allowed size of 1.0 Mb")
    assert shares(page) == own
    look(page, folder / "photos" / "scene 1.png")
    assert page.locator(".message").is_hidden()


def test_uncertainty_keyboard_search_and_a_narrow_window(open_page, folder, head, tmp_path):
    page = open_page(viewport={"width": 390, "height": 800})
    page.get_by_label("Thumbnail 3 of 3").click()
    page.wait_for_selector(".viewer .main:visible")
    assert page.locator(".stage img").get_attribute("alt") == "scene 2.png"
    page.select_option(".shows select", "entropy")
    page.wait_for_selector(".scale:visible")
    page.locator(".stage").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".tip:visible")
    assert re.search(r", [\d.]+ nats \(x \d+, y \d+\)$", page.inner_text(".read"))
    assert page.locator(".shows option").count() == (2 if head == "mean_shift" else 4)
    page.fill("input[type=search]", "SKY")
    count = page.locator(".legend button").count()
    visible = page.locator(".legend button:visible").count()
    assert page.inner_text(".count") == f"{visible} of {count} classes in this image"
    page.fill("input[type=search]", "")
    page.click(".none")
    page.select_option(".shows select", "classes")
    assert painted(page) == 0
    page.locator(".legend button").first.press("Space")
    assert painted(page) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
