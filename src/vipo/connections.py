"""A server with a thread for each connection, and only so many: one that shows no token gives way to one that waits."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any

CONNECTIONS = 64  # at once, a thread each
GRACE_SECONDS = 1.0  # a connection that shows no token for so long gives way to one that waits
FINISH_SECONDS = 10.0  # requests under way at the end get so long
REFUSAL_SECONDS = 0.1  # for telling one too many
SPENT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)

_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"error": "too many connections are open; try again later"}'
)


class _Connection:
    """One that was accepted: since when, and whether it has shown that it may ask."""

    def __init__(self, taken: socket.socket) -> None:
        self.socket, self.since, self.admitted = taken, time.monotonic(), False

    def close(self) -> None:
        """Let whoever waits for it go on: there is nothing more to read."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class BoundedServer(ThreadingHTTPServer):
    """``serve_forever`` as in the standard library, with at most ``CONNECTIONS`` open at once."""

    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        super().__init__(address, handler)
        self._open: dict[int, _Connection] = {}
        self._changed = threading.Condition()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Without a descriptor to spare it is tried again, but not at once and not with the same strangers."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in SPENT:
                with self._changed:
                    self._make_room()
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection, if need be in the place of one that shows no token."""
        with self._changed:
            if len(self._open) >= CONNECTIONS:
                self._make_room()
            found = len(self._open) < CONNECTIONS
        if not found:
            with suppress(OSError):
                request.settimeout(REFUSAL_SECONDS)
                request.sendall(_FULL)
        return found

    def _make_room(self) -> None:
        """Wait until a connection ends, if need be by ending the oldest that has shown no token; not for long."""
        oldest = next((taken for taken in self._open.values() if not taken.admitted), None)
        patient = oldest is None or time.monotonic() - oldest.since < GRACE_SECONDS
        if patient and self._changed.wait(GRACE_SECONDS):
            return
        if oldest is not None:
            oldest.close()
            self._changed.wait(GRACE_SECONDS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count a connection until its answer is out."""
        with self._changed:
            self._open[id(request)] = _Connection(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._changed:
            self._open.pop(id(request), None)
            self._changed.notify_all()

    def admit(self, request: Any) -> None:
        """The connection has shown the token, or needs none: it gives way to no other."""
        with self._changed:
            if id(request) in self._open:
                self._open[id(request)].admitted = True

    def finish(self) -> None:
        """Close once every request that was accepted has its answer, or after a while without."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, FINISH_SECONDS)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else goes to the log with its trace."""
        known = isinstance(sys.exc_info()[1], ConnectionError | TimeoutError)
        log.log(logging.DEBUG if known else logging.ERROR, "request from %s failed", client_address, exc_info=True)
