"""A model hub on loopback: as much of the Hugging Face hub's HTTP interface as its client asks for both ways."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = Mapping[str, bytes]


@contextmanager
def fake_hub(
    repositories: dict[str, Any], gated: tuple[str, ...] = (), token: str | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what was asked of it; a data set's id begins with ``datasets/``.

    What ``token`` may write goes into ``repositories``, a dict then; one made private has a file ``.private`` there.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            allowed = token is not None and self.headers["Authorization"] == f"Bearer {token}"
            answer = self._written(path, body) if allowed or path == "api/validate-yaml" else {"error": "no"}
            content = json.dumps(answer).encode()
            self.send_response(403 if "error" in answer else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _written(self, path: str, body: bytes) -> dict[str, Any]:
            if path == "api/repos/create":
                asks = json.loads(body)
                name = f"{asks['organization']}/{asks['name']}"
                repositories[name] = {".private": b""} if asks.get("visibility") == "private" else {}
                return {"url": f"{address()}/{name}"}
            owner, repository, what = [*path.removeprefix("api/models/").split("/", 2), ""][:3]
            name = f"{owner}/{repository}"
            if what.startswith("preupload/"):
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return {"files": [{**file, "shouldIgnore": False} for file in files]}
            if what.startswith("commit/"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return {"commitUrl": f"{address()}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            return {}

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
                "private": ".private" in repositories[name],
                "gated": "manual" if name in gated else False,
                "cardData": {"license": "mit"},
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def address() -> str:
        return f"http://127.0.0.1:{server.server_port}"

    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address(), asked
    finally:
        server.shutdown()
        server.server_close()
