"""The page at `/`, a chat in the browser. Its files lie in `page_files/`."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

_LOADED = (
    *("page.css", "page.js", "chats.js", "files.js", "markdown.js", "favicon.svg"),
    # Libraries, as their npm packages markdown-it, @highlightjs/cdn-assets and temml ship them.
    *("markdown-it.min.js", "highlight.min.js", "temml.min.js", "temml.css"),
)
_FILES = {"/": "page.html"} | {f"/{name}": name for name in _LOADED}
PAGE_PATHS = frozenset(_FILES)
_HEADERS = {
    # An answer may name pictures and scripts of other servers. Nothing is fetched from there. The
    # only picture is the page's own icon.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",  # looks up the servers that an answer links to
    "x-content-type-options": "nosniff",
}


def page_routes() -> list[Route]:
    """Return the routes of the page and of what it loads."""
    return [Route(path, _send, methods=["GET"]) for path in _FILES]


async def _send(request: Request) -> FileResponse:
    name = _FILES[request.url.path]
    return FileResponse(Path(__file__).with_name("page_files") / name, headers=_HEADERS)
