"""A model hub on loopback: as much of the Hugging Face hub's HTTP interface as its client asks for a download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = Mapping[str, bytes]


@contextmanager
def fake_hub(repositories: Mapping[str, Files], gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what was asked of it; a data set's id begins with ``datasets/``."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            """Nothing on the error stream."""

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"{self.command} {path}")
            status, headers, content = self._found(path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _found(self, path: str) -> tuple[int, dict[str, str], bytes]:
            if path.startswith("api/"):
                kind, _, rest = path.removeprefix("api/").partition("/")
                named = rest if kind == "models" else f"{kind}/{rest}"
                name, listing, _ = named.partition("/tree/")
                return self._tree(name) if listing else self._info(named.partition("/revision/")[0])
            place, _, rest = path.partition("/resolve/")
            file = rest.partition("/")[2]
            if place in gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            if file not in repositories.get(place, {}):
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            content = repositories[place][file]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return 200, headers, content

        def _tree(self, name: str) -> tuple[int, dict[str, str], bytes]:
            files = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in repositories[name].items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(files).encode()

        def _info(self, name: str) -> tuple[int, dict[str, str], bytes]:
            if name not in repositories:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            siblings = [{"rfilename": file, "size": len(content)} for file, content in repositories[name].items()]
            info = {
                "id": name.removeprefix("datasets/"),
                "sha": COMMIT,
                "siblings": siblings,
                "gated": "manual" if name in gated else False,
                "cardData": {"license": "mit"},
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
