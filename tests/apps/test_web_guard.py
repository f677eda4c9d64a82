"""What a stranger's call of the page can ask for."""

import asyncio
import json
from pathlib import Path

from vild.apps.web_guard import JOIN, RequestFilter


def ask(folder: Path, body: object) -> int:
    """The status of a call of the page with this JSON; 200 where the guard lets it pass."""
    sent, content = [], json.dumps(body).encode()

    async def app(scope, receive, send):
        assert (await receive())["body"] == content
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": "POST", "path": JOIN, "headers": headers}
    asyncio.run(RequestFilter(app, folder, 10**6)(scope, receive, send))
    return sent[0]["status"]


def test_the_page_is_asked_for_no_file_but_uploads(tmp_path):
    folder, other = tmp_path / "up", tmp_path / "up-not"
    for place in (folder, other):
        place.mkdir()
        (place / "a.png").touch()
    (folder / "link.png").symlink_to(other / "a.png")
    data = lambda path: {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, None, 0.3], "fn_index": 0}  # noqa: E731
    assert ask(folder, data(str(folder / "a.png"))) == ask(folder, data(None)) == 200
    for path in ("/etc/passwd", str(other / "a.png"), f"{folder}/../up-not/a.png", str(folder / "link.png"), "a.png",
                 "https://example.org/a.png", f"{folder}/a\0.png", 3, ["/etc/passwd"], {"path": "x"}):  # fmt: skip
        assert ask(folder, data(path)) == 403, path
    assert ask(folder, {"data": [{"deep": [{"path": "/etc/passwd"}]}]}) == 403
