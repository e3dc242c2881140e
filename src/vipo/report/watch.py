"""A run's report on this machine's loopback, which reloads itself while the run goes on. Nothing else is served."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from vipo.connections import BoundedServer
from vipo.errors import UserError
from vipo.report.page import render
from vipo.report.run import read_run

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # that a browser may ask by: another name is another site's way in
LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl", "recipe.yaml")  # the page changes with them
# And with what is written after the log that tells of it: a sheet of maps, the checkpoint of the best evaluation.
WHOLE = ("maps/step-*.png", "samples/step-*.png", "checkpoints/step-*/state.json")
SECONDS = 2  # between a page's questions whether it is old
IDLE_SECONDS = 10.0  # a connection that says nothing for so long is closed

log = logging.getLogger(__name__)

_RELOAD = """<script>
(() => {
  const seen = %s;
  setInterval(async () => {
    try {
      const now = await (await fetch("/stamp", {cache: "no-store"})).text();
      if (now !== seen) location.reload();
    } catch (gone) { /* the server has ended: the page stays as it is */ }
  }, %d);
})();
</script></body>"""


class Watched:
    """The page of a run, rendered anew only when there is more to show, one rendering at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.Lock()
        self._stamp: str | None = None  # of the page
        self._page = b""

    def stamp(self) -> str:
        """Another one whenever the page would be another."""
        files = [path.stat() for name in LOGS if (path := self.folder / name).exists()]
        names = sorted(str(path.relative_to(self.folder)) for kind in WHOLE for path in self.folder.glob(kind))
        whole = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
        return "-".join([*(f"{file.st_size}.{file.st_mtime_ns}" for file in files), whole])

    def page(self) -> bytes:
        """The report with what reloads it.

        Raises:
            UserError: the folder holds no run any more.
        """
        with self._lock:
            stamp = self.stamp()  # before it is read: what comes while it is rendered shows as new
            if stamp != self._stamp:
                head, body, tail = render(read_run(self.folder)).rpartition("</body>")
                self._page = (head + _RELOAD % (f'"{stamp}"', 1000 * SECONDS) + tail if body else tail).encode()
                self._stamp = stamp
            return self._page


def watching(folder: Path, port: int = 0) -> BoundedServer:
    """A server of the run's report, ready to ``serve_forever``; its address is that of ``server_address``.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: no run is in ``folder``, or the port is taken.
    """
    watched = Watched(folder)
    watched.page()  # a folder that holds no run is told at once
    try:
        return BoundedServer((HOST, port), _handler(watched))
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} of {HOST} cannot be had: {error}; take another with --port, 0 for any") from error


def _handler(watched: Watched) -> type[BaseHTTPRequestHandler]:
    pages: dict[str, tuple[str, Callable[[], bytes]]] = {
        "/": ("text/html; charset=utf-8", watched.page),
        "/stamp": ("text/plain; charset=ascii", lambda: watched.stamp().encode()),
    }

    class Handler(BaseHTTPRequestHandler):
        timeout = IDLE_SECONDS

        def do_GET(self) -> None:
            asked = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if asked not in NAMES:
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path not in pages:
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                self._answer(*pages[self.path])

        def _answer(self, kind: str, made: Callable[[], bytes]) -> None:
            try:
                content = made()
            except UserError as error:
                self.send_error(HTTPStatus.GONE, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": len(content),
                "Cache-Control": "no-store",
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler
