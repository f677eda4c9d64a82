"""A Hugging Face hub with one repository, on this machine: what huggingface_hub asks to download a snapshot."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c" * 40


@contextmanager
def hub(repository: str, files: dict[str, bytes]) -> Iterator[str]:
    """Its address, for HF_ENDPOINT."""
    tree = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, resolved = urlsplit(self.path).path, f"/{repository}/resolve/{COMMIT}/"
            if path in (f"/api/models/{repository}", f"/api/models/{repository}/revision/main"):
                self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/models/{repository}/tree/{COMMIT}":
                self.answer(json.dumps(tree).encode())
            elif path.startswith(resolved) and path.removeprefix(resolved) in files:
                self.answer(files[path.removeprefix(resolved)])
            else:
                self.answer(b"{}", 404)

        do_HEAD = do_GET

        def answer(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
