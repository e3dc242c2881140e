"""HTTP servers for tests: one that says what it is told to say, and a reward server on a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vipo.rewards.server import RewardServer
from vipo.types import Reward


@dataclass(frozen=True)
class Reply:
    """What to answer. ``missing_bytes`` breaks the body off early; ``trickle_seconds`` is waited before every byte."""

    body: Any = None  # bytes as they are, anything else as JSON
    status: int = 200
    after_seconds: float = 0.0
    missing_bytes: int = 0
    trickle_seconds: float = 0.0


@dataclass
class Scripted:
    """What the server was asked, and how it answers: ``answer`` gets the parsed body and the request's number."""

    answer: Callable[[Any, int], Reply]
    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextmanager
def scripted(answer: Callable[[Any, int], Reply]) -> Iterator[Scripted]:
    script, lock = Scripted(answer), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                script.bodies.append(body)
                script.headers.append(dict(self.headers))
                script.paths.append(self.path)
                number = len(script.bodies) - 1
            reply = script.answer(body, number)
            time.sleep(reply.after_seconds)
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            content = content[: len(content) - reply.missing_bytes]
            for start in range(len(content)) if reply.trickle_seconds else [None]:
                time.sleep(reply.trickle_seconds)
                self.wfile.write(content if start is None else content[start : start + 1])

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that gave up

    server = Quiet(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    with _running(server):
        yield script


@contextmanager
def served(reward: Reward, **options: Any) -> Iterator[RewardServer]:
    server = RewardServer(reward, "mine", port=0, **options)
    with _running(server):
        yield server


@contextmanager
def _running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
