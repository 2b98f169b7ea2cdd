"""Serve the page: on this machine alone unless told otherwise, and without a word to anybody else."""

import logging
import os
import socket
import tempfile
import webbrowser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from segheads.errors import OptionError, PackageMissingError
from segheads.page.layout import build_page
from segheads.page.views import Viewer

LOOPBACK = ("127.0.0.1", "::1")
FONTS = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]  # of the system: none is fetched
MONO = ["ui-monospace", "Consolas", "monospace"]
# Should a part of Gradio ask for anything elsewhere, the browser refuses
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "form-action 'self'; base-uri 'self'; frame-ancestors 'self'"
)
STYLE = """
footer { display: none !important; }
h1 { font-size: 18px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
"""
log = logging.getLogger(__name__)


def check_gradio() -> None:
    """Refuse to begin without Gradio.

    Raises:
        PackageMissingError: If it is not installed.
    """
    if find_spec("gradio") is None:
        raise PackageMissingError('the page needs gradio, which is not installed: pip install "segheads[demo]"')


def open_socket(host: str, port: int) -> socket.socket:
    """A place to listen at, found before a model is loaded.

    Args:
        host: Name or address of this machine.
        port: 0 takes any that is free.

    Raises:
        OptionError: The port is taken or not allowed, or there is no such host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OptionError(
            f"--host {host} --port {port} cannot be used ({error.strerror}); give another, or --port 0 for any free one"
        ) from error


def address_of(place: socket.socket) -> str:
    """The address of the page for a browser on this machine.

    Args:
        place: Where it listens.
    """
    host, port = place.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    viewer: Viewer, place: socket.socket, *, title: str, examples: Sequence[Path], max_upload: float, browse: bool
) -> None:
    """Serve the page until a signal ends it; uploads lie in a temporary folder that goes with it.

    Args:
        viewer: The model.
        place: Where to listen.
        title: Name of the model.
        examples: Image files to choose from.
        max_upload: The most that an upload may have, MB (2**20 bytes).
        browse: Open a browser, too.
    """
    with tempfile.TemporaryDirectory(prefix="segheads-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # which Gradio reads as it is imported
        import uvicorn

        app = mount(build_page(viewer, title=title, examples=examples, folder=Path(folder)), max_upload)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        log.info("%s is at %s; Ctrl-C ends it", title, address_of(place))
        if place.getsockname()[0] not in LOOPBACK:
            log.info("everyone who reaches this machine can use it: there is no password")
        if browse:
            webbrowser.open_new_tab(address_of(place))
        server.run(sockets=[place])


def mount(page: Any, max_upload: float) -> Any:
    """The page as an application, without Gradio's links, history, programs' interfaces and fonts from elsewhere.

    Args:
        page: Of `build_page`.
        max_upload: The most that an upload may have, MB (2**20 bytes).
    """
    import gradio as gr
    from fastapi import FastAPI, Request

    outer = FastAPI(openapi_url=None)

    @outer.middleware("http")
    async def keep_inside(request: Request, call_next: Any) -> Any:
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    theme = gr.themes.Default(font=FONTS, font_mono=MONO).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    quiet: Any = {"footer_links": [], "run_history": False, "enable_monitoring": False, "mcp_server": False}
    quiet |= {"ssr_mode": False, "show_error": False, "allowed_paths": []}
    return gr.mount_gradio_app(
        outer, page, path="/", max_file_size=int(max_upload * 2**20), theme=theme, css=STYLE, **quiet
    )
