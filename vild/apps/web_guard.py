"""Request filter in front of gradio: only the routes that the page needs, bounded sizes, no URLs to fetch.

gradio itself downloads URLs named in requests (``file=https://...``, or a file whose path is a URL) and accepts bodies
of any length.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

PAGE = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
CALLS = {
    "/gradio_api/" + name for name in ("queue/data", "upload_progress", "startup-events", "info", "app_id", "user")
}
UPLOAD, JOIN, LIGHT = "/gradio_api/upload", "/gradio_api/queue/join", ("/gradio_api/cancel", "/gradio_api/reset")
MOST_JSON = 1_000_000
MOST_STORED = 1_000_000_000  # bytes of uploads and drawings, which expire by age
AROUND = 10_000  # bytes that a form adds to its file
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # no requests to other hosts


class RequestFilter:
    """ASGI middleware.

    Args:
        app: the application to protect.
        folder: the folder of uploads and drawings, the only files that are served.
        most_bytes: maximum size of an upload.
    """

    def __init__(self, app, folder: Path, most_bytes: int):
        self.app, self.folder, self.most_bytes = app, Path(folder), most_bytes

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        refusal = self._refusal(scope)
        if refusal is None and scope["path"] == JOIN:
            body = await _body(receive)
            if _names_a_foreign_file(body, self.folder):
                refusal = (403, "Only files that were uploaded here, please.")
            receive = _again(body, receive)
        if refusal is not None:
            return await _answer(send, *refusal)

        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        return await self.app(scope, receive, with_policy)

    def _refusal(self, scope) -> tuple[int, str] | None:
        """HTTP status and text of a refusal; None for an allowed request."""
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        if method in ("GET", "HEAD"):
            file = scope["path"].startswith(f"/gradio_api/file={self.folder}/")
            known = path in PAGE | CALLS or scope["path"].startswith(FOLDERS) or file
            return None if known else (404, "There is no such page.")
        if method != "POST" or path not in (UPLOAD, JOIN, *LIGHT):
            return 404, "There is no such page."
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not length.isdigit():
            return 411, "The request needs a Content-Length."
        if int(length) > (self.most_bytes + AROUND if path == UPLOAD else MOST_JSON):
            return 413, "This is too large."
        if path == UPLOAD and stored(self.folder) > MOST_STORED:
            return 503, "Too many images at the moment."
        return None


def stored(folder: Path) -> int:
    """Total bytes of the files below a folder. Files may disappear meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _names_a_foreign_file(body: bytes, folder: Path) -> bool:
    """Whether the JSON of a call names a file that gradio would fetch, or one that is not an upload."""
    paths = []
    try:
        json.loads(body, object_hook=lambda record: paths.append(record.get("path")) or record)
    except (ValueError, RecursionError):
        return True
    return not all(path is None or is_upload(path, folder) for path in paths)


def is_upload(path: object, folder: str | Path) -> bool:
    """Whether this is the path of something in the folder of uploads; links are followed."""
    if not isinstance(path, str) or "://" in path or "\0" in path:
        return False
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


async def _body(receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive):
    """A ``receive`` that returns the body once more, then continues with the original."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return left.pop() if left else await receive()

    return again


async def _answer(send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
