"""A hub of one repository on localhost: the routes that huggingface_hub 2 calls, and faults.

GET /api/models/ORG/NAME[/revision/REV], GET .../tree/COMMIT, HEAD and GET
/ORG/NAME/resolve/COMMIT/FILE with Range.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `files` until closed. `sent` lists (file, first byte, bytes) of every GET of a file.

    `fault(handler, file)` may answer a request for a file itself, and then returns True; `refuse`
    is a status and an error code to answer everything with.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sent: list[tuple[str, int, int]] = []
        self.requests: list[str] = []
        self.fault: Callable[[Handler, str], bool] = lambda handler, file: False
        self.refuse: tuple[int, str] | None = None
        self.revisions = {"main", "v1", COMMIT}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self  # pyright: ignore[reportAttributeAccessIssue]
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def weights_sent(self) -> list[tuple[str, int, int]]:
        return [sent for sent in self.sent if sent[0].endswith(".safetensors")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # pyright: ignore[reportAttributeAccessIssue]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refuse is not None:
            return self.answer(self.hub.refuse[0], {"X-Error-Code": self.hub.refuse[1]})
        api = f"api/models/{REPOSITORY}"
        if path == api or path.startswith(f"{api}/revision/"):
            return self.repository(path.removeprefix(api).removeprefix("/revision/") or "main")
        if path == f"{api}/tree/{COMMIT}":
            return self.json([{"type": "file", **entry} for entry in self.entries()])
        file = path.removeprefix(f"{REPOSITORY}/resolve/{COMMIT}/")
        if file in self.hub.files:
            return None if self.hub.fault(self, file) else self.file(file)
        return self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def repository(self, revision: str) -> None:
        if revision not in self.hub.revisions:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in self.entries()]
        return self.json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})

    def entries(self) -> list[dict]:
        return [
            {"path": name, "size": len(content), "oid": etag(content)}
            for name, content in self.hub.files.items()
        ]

    def file(self, name: str, upto: int | None = None) -> None:
        """Send a file; one cut at byte `upto` ends the connection."""
        content = self.hub.files[name]
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        begin = int(wanted)
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        body = content[begin:upto]
        if self.command == "GET":
            self.hub.sent.append((name, begin, len(body)))
        self.answer(206 if begin else 200, headers, body, len(content) - begin)
        if upto is not None:
            self.close_connection = True

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(
        self, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
