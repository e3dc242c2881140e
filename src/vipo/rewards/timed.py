"""A socket whose every wait counts against one moment: a peer that sends a byte now and then is not waited for
for ever.

A time-out of the standard library holds for each packet alone.
"""

from __future__ import annotations

import io
import socket
import time
from typing import Any


class TimedSocket:
    """Reads and writes of ``connection`` until a moment that can be moved; what ``http.client`` needs of a socket.

    Args:
        seconds: from now on, for everything that is read and written.
        room: bytes that may be read; None means any number.
    """

    def __init__(self, connection: socket.socket, seconds: float, room: int | None = None) -> None:
        self.connection, self.room = connection, room
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """So many seconds from now on."""
        self._end = time.monotonic() + seconds

    def _wait(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        self.connection.settimeout(left)

    def sendall(self, content: Any) -> None:
        self._wait()
        self.connection.sendall(content)

    def receive_into(self, buffer: Any) -> int:
        """As much as there is, once there is anything."""
        self._wait()
        count = self.connection.recv_into(buffer)
        if self.room is not None:
            self.room -= count
            if self.room < 0:
                raise ConnectionError("it is longer than it may be")
        return count

    def makefile(self, _mode: str = "rb") -> io.BufferedReader:
        return io.BufferedReader(_Received(self))

    def close(self) -> None:
        """``http.client`` closes before it reads the answer; whoever has the connection closes that."""


class _Received(io.RawIOBase):
    def __init__(self, timed: TimedSocket) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._timed.receive_into(buffer)
