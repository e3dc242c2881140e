"""Serve one reward to runs in other processes: ``vipo serve-reward NAME``. The messages are those of ``wire.py``.

Requests are read side by side and scored one after the other. Without a token only this machine is listened to. A
request that cannot be served gets a status and ``{"error": one sentence}``: 4xx if sending it again would not help.

Whatever is sent, what it takes is bounded: ``connections.CONNECTIONS`` threads, of which those that have not shown the
token give way to others; ``HEAD_SECONDS`` and ``HEAD_BYTES`` for what comes before a body; ``BODIES`` bodies in memory,
of which a slow one gives way to others; pixels as many as the longest body could hold in 8 bits, counted before any is
decoded.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from types import FrameType
from typing import Any, cast

import torch

from vipo.connections import GRACE_SECONDS, BoundedServer
from vipo.errors import UserError
from vipo.rewards import build, wire
from vipo.rewards.answer import Answer
from vipo.rewards.http import read_token
from vipo.rewards.scoring import ask
from vipo.rewards.timed import TimedSocket
from vipo.types import Reward

MEGABYTE = 10**6
HEAD_SECONDS, HEAD_BYTES = 10.0, 2**18  # for the lines before a body
BODIES = 4  # requests held in memory at once; others wait unread
WAIT_SECONDS = 30.0  # for one of these places, before the client is told to come back
BODY_SECONDS, STALL_SECONDS = 600.0, 60.0  # for a body, and for each packet of it
SLOW_BYTES = 10**6  # a second: a body that comes slower gives way to one that waits
LOOK_SECONDS = 0.5  # between looks whether another waits
DISCARD_SECONDS = 10.0
CHUNK_BYTES = 2**20
PORT = 8421

log = logging.getLogger(__name__)


class HttpError(Exception):
    """A request that gets a sentence and a status instead of scores."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class RewardServer(BoundedServer):
    """One reward behind GET /health, GET /info and POST /score. ``serve_forever`` as in the standard library.

    Args:
        name: what /info says; has no other meaning.
        port: 0 takes a free one, see ``url``.
        token: what the client must show; required to listen beyond this machine.
        max_bytes: a longer body is refused unread.
        device: where media go before the reward sees them.

    Raises:
        UserError: no token and not a loopback host, or the address cannot be bound.
    """

    def __init__(
        self,
        reward: Reward,
        name: str,
        *,
        host: str = "127.0.0.1",
        port: int = PORT,
        token: str | None = None,
        max_bytes: int = 256 * MEGABYTE,
        device: str = "cpu",
    ) -> None:
        check_host(host, token)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from error
        self.reward, self.name, self.token, self.max_bytes, self.device = reward, name, token, max_bytes, device
        self.started = time.monotonic()
        self._model, self._decoding = threading.Lock(), threading.Lock()
        self._bodies, self.waiting = threading.BoundedSemaphore(BODIES), 0

    @property
    def url(self) -> str:
        """Where it listens, for the ``url`` of a :class:`vipo.rewards.remote.Remote`."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"

    @property
    def max_pixels(self) -> int:
        """Of one request, over all frames: as many as ``max_bytes`` hold in 8 bits and base64."""
        return self.max_bytes // 4

    def answer(self, body: bytes) -> Mapping[str, Any]:
        """Decode and score a request when its turn comes: one is decoded while one is scored, and no third."""
        with self._decoding:
            try:
                request = wire.decode_request(body, self.max_pixels)
            except wire.TooLargeError as error:
                raise HttpError(413, f"{error}; lower batch_size, or serve with a higher --max-megabytes") from error
            except wire.WireError as error:
                raise HttpError(400, str(error)) from error
            self._model.acquire()
        try:
            return wire.encode_answer(request.ids, self._scored(request), evidence=request.evidence)
        except wire.TooLargeError as error:
            raise HttpError(422, str(error)) from error
        finally:
            self._model.release()

    def _scored(self, request: wire.Request) -> Answer:
        try:
            media = request.media.to(self.device)
            answer = ask(self.name, self.reward, media, request.prompts, locate=request.evidence)
        except UserError as error:
            log.exception("the reward failed")
            raise HttpError(422, str(error)) from error
        if len(answer.unreached) == len(request.ids):
            raise HttpError(503, answer.causes[0])
        return answer

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for one body in memory."""
        self._count_waiting(1)
        try:
            found = self._bodies.acquire(timeout=WAIT_SECONDS)
        finally:
            self._count_waiting(-1)
        if not found:
            raise HttpError(503, "too many requests wait already; try again later")
        try:
            yield
        finally:
            self._bodies.release()

    def _count_waiting(self, more: int) -> None:
        with self._changed:
            self.waiting += more


class _Handler(BaseHTTPRequestHandler):
    unread = 0  # bytes of the body

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.timed = TimedSocket(self.connection, HEAD_SECONDS, HEAD_BYTES)
        self.rfile = self.timed.makefile()

    def do_GET(self) -> None:
        self._reply(self._look_up)

    def do_POST(self) -> None:
        self._reply(self._score)

    @property
    def _home(self) -> RewardServer:
        return cast(RewardServer, self.server)

    def _look_up(self) -> Mapping[str, Any]:
        home = self._home
        if self.path == "/health":
            return {"status": "ok", "uptime_seconds": round(time.monotonic() - home.started, 1)}
        self._check_token()
        if self.path == "/info":
            size = home.max_bytes // MEGABYTE
            return {"name": home.name, "version": version("vipo"), "protocol": wire.VERSION, "max_megabytes": size}
        raise HttpError(404, f"there is no GET {self.path[:100]}; use GET /health, GET /info or POST /score")

    def _score(self) -> Mapping[str, Any]:
        self.unread = self._length()
        self._check_token()
        if self.path != "/score":
            raise HttpError(404, f"there is no POST {self.path[:100]}; use POST /score")
        if self.headers.get_content_type() != "application/json":  # also keeps web pages from posting here
            raise HttpError(415, "the body must be of Content-Type application/json")
        if self.unread > self._home.max_bytes:
            limit = f"{self._home.max_bytes / MEGABYTE:g}"
            raise HttpError(
                413,
                f"{self.unread} bytes are over {limit} MB; lower batch_size, take encoding=8bit, or serve with a higher"
                " --max-megabytes",
            )
        with self._home.place():
            return self._home.answer(self._body())

    def _check_token(self) -> None:
        expected, shown = self._home.token, self.headers.get("Authorization", "")
        if expected is not None and not hmac.compare_digest(f"Bearer {expected}".encode(), shown.encode()):
            raise HttpError(401, "the bearer token is missing or wrong; set token_env as on the server")
        self._home.admit(self.connection)

    def _length(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise HttpError(411, f"a Content-Length in bytes is required, not {length[:20]!r}")
        return int(length)

    def _body(self) -> bytes:
        length, content = self.unread, bytearray()
        began, heard = time.monotonic(), time.monotonic()
        while len(content) < length:
            self.timed.allow(LOOK_SECONDS)
            now = time.monotonic()
            try:
                chunk = self.rfile.read1(min(length - len(content), CHUNK_BYTES))
            except TimeoutError:
                self._check_pace(len(content), now - began, now - heard)
                continue
            if not chunk:
                self.unread = 0
                raise HttpError(400, f"the body broke off after {len(content)} of {length} bytes")
            content += chunk
            heard, self.unread = time.monotonic(), length - len(content)
            self._check_pace(len(content), heard - began, 0.0)
        return bytes(content)

    def _check_pace(self, count: int, seconds: float, silent: float) -> None:
        """Seconds since the first byte, and since the last."""
        if silent > STALL_SECONDS:
            raise HttpError(408, f"the body stopped for {STALL_SECONDS:g} seconds")
        if seconds > BODY_SECONDS:
            raise HttpError(408, f"the body took more than {BODY_SECONDS:g} seconds")
        if self._home.waiting and seconds > 2 * GRACE_SECONDS and count < seconds * SLOW_BYTES:
            raise HttpError(408, f"the body came slower than {SLOW_BYTES} bytes a second, and others wait")

    def _reply(self, action: Callable[[], Mapping[str, Any]]) -> None:
        self.timed.room = None  # the lines before the body are read
        try:
            status, body = 200, action()
        except HttpError as error:
            status, body = error.status, {"error": str(error)}
        except Exception:
            self._send(500, {"error": "the server has a fault; its log says which"})
            raise
        self._send(status, body)
        self._discard()

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        content = json.dumps(body, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.connection.settimeout(STALL_SECONDS)
        self.wfile.write(content)

    def _discard(self) -> None:
        """Read on after a refusal: a client that is still sending would lose the answer if we hung up."""
        self.timed.allow(DISCARD_SECONDS)
        with suppress(TimeoutError):
            while self.unread > 0 and (chunk := self.rfile.read1(min(self.unread, CHUNK_BYTES))):
                self.unread -= len(chunk)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The standard library's own refusals, in our form; it says 501 for a method that we do not have."""
        self._send(405 if code == 501 else code, {"error": message or explain or "the request is malformed"})

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def check_host(host: str, token: str | None) -> None:
    """Without a token only this machine may ask.

    Raises:
        UserError: the host is unknown, or reachable from elsewhere and there is no token.
    """
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"host {host!r} is unknown: {error}; give 127.0.0.1 or an IPv4 address of this machine"
        ) from error
    if token is None and not address.is_loopback:
        raise UserError(
            f"host {host!r} can be reached from other machines; put a secret into a variable and add"
            " --token-env VARIABLE, or use --host 127.0.0.1"
        )


def serve(
    name: str,
    options: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    token_env: str | None = None,
    max_megabytes: float = 256,
    device: str | None = None,
) -> None:
    """Build the reward ``name`` with its options, print where it is served, and serve until Ctrl-C or SIGTERM.

    Args:
        token_env: environment variable that holds the bearer token.
        max_megabytes: longest request, in 10^6 bytes.
        device: None takes the accelerator if there is one.

    Raises:
        UserError: the reward, an option, the token or the address is not usable.
    """
    size = int(max_megabytes * MEGABYTE)
    if size < 1:
        raise UserError(f"max_megabytes={max_megabytes} leaves no room for a request; the default is 256")
    token = read_token(token_env)
    check_host(host, token)  # before minutes are spent on loading the reward
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    server = RewardServer(
        build(name, **options), name, host=host, port=port, token=token, max_bytes=size, device=device
    )
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, _interrupt)
        sys.stdout.write(f"reward {name!r} is served at {server.url}\n")
        sys.stdout.flush()
        server.serve_forever()
    server.finish()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
