"""`segheads demo`: what ends it in one line before a page is served; tests/page/test_browser.py looks at the page."""

import socket
from pathlib import Path

import pytest

from segheads import create_model
from segheads.cli import main
from segheads.page import server

RECIPE = Path("demo.py")


@pytest.fixture
def model(tmp_path):
    create_model("test_vit", "linear", 3, pretrained=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def served(monkeypatch):
    """What the page would be served with; Gradio is not needed."""
    found = []
    monkeypatch.setattr(server, "find_spec", lambda name: name)
    monkeypatch.setattr("segheads.cli.demo.serve", lambda viewer, place, **options: found.append((viewer, options)))
    return found


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *map(str, words)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_options_reach_the_page(served, model, tmp_path, capsys):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "more/a.jpg", "notes.txt"):
        (tmp_path / "photos" / name).touch()
    words = ["--port", "0", "--max-upload", "2.5", "--max-pixels", "99", "--window", "32", "--threads", "1", "--open"]
    main(["demo", "--model", str(model), "--examples", str(tmp_path / "photos"), "--device", "cpu", *words])
    ((viewer, options),) = served
    assert viewer.predictor.protocol.window == 32
    assert viewer.max_pixels == 99
    assert [path.name for path in options.pop("examples")] == ["b.png", "a.jpg"]
    assert options == {"title": str(model), "max_upload": 2.5, "browse": True}


def test_without_gradio_one_line_says_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    said = 'error: the page needs gradio, which is not installed: pip install "segheads[demo]"\n'
    assert error_of(capsys, "--model", model) == said


def test_a_port_that_is_taken(served, model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = error_of(capsys, "--model", model, "--port", port)
    assert said.startswith(f"error: --host 127.0.0.1 --port {port} cannot be used (Address already in use")
    assert said.endswith("; give another, or --port 0 for any free one\n")


@pytest.mark.parametrize(
    ("words", "begin"),
    [
        (["--host", "no.such.host.invalid"], "error: --host no.such.host.invalid --port 0 cannot be used ("),
        (["--examples", "missing"], "error: --examples missing is no folder with images; give one that has some"),
        (["--model", "missing"], "error: "),
        (["--device", "tpu"], "error: --device tpu cannot be used: "),
        (["--port", "70000"], "error: port must be 0 to 65535; got 70000"),
        (["--max-upload", "0"], "error: max_upload must be above 0; got 0"),
        (["--window", "8", "--whole"], "error: --whole shows no windows"),
        (["--threshold", "0.3"], "error: a threshold is for models of one class"),
    ],
)
def test_what_cannot_begin_is_said_in_one_line(served, model, words, begin, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = error_of(capsys, "--model", model, "--port", "0", *words)
    assert said.startswith(begin)
    assert len(said.splitlines()) == 1
    assert not served


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
def test_the_address_is_one_for_this_machine(host, shown):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with server.open_socket(host, 0) as place:
        assert server.address_of(place) == f"http://{shown}:{place.getsockname()[1]}"
