"""The page at `/ui`: plain files of our own, which ask through `/v1` as any client does."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

FOLDER = Path(__file__).parents[1] / "ui"
_FILES = {
    "/ui": ("index.html", "text/html"),
    "/ui/app.js": ("app.js", "text/javascript"),
    "/ui/style.css": ("style.css", "text/css"),
}
_HEADERS = {
    # nothing from anywhere else, and nothing inline
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """The page's routes. It needs no key; what it asks for does."""
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _answering((FOLDER / name).read_bytes(), kind), methods=["GET"])


def _answering(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer
