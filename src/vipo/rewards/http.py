"""JSON over HTTP to a reward in another process: time-outs, retries, a circuit breaker. Standard library only.

    pause before retry k = first pause * 2^k * (0.5 + u),   u in [0, 1) from the bytes sent

u keeps processes that failed together from coming back together, and is the same in every run. What may pass (no
connection, a time-out, a 5xx, 408, 429) is retried and then raised as ``RewardUnavailable``; what will not pass (any
other status, an answer that is not JSON) is a ``UserError`` at once. Redirects and proxies are not followed.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, cast
from urllib.parse import urlsplit

from vipo.errors import UserError
from vipo.rewards.answer import RewardUnavailable
from vipo.rewards.timed import TimedSocket
from vipo.secrets import redacted, remember

OK, SERVER_ERROR = 200, 500
MAY_PASS = (408, 429)  # too slow, too many: the two statuses below 500 that say: later
MAX_ANSWER_BYTES = 4 * 2**20  # thousands of scores, or a long chat; JSON takes twenty times its text at most
CHUNK_BYTES = 2**16
QUOTED_CHARACTERS = 200  # of what a server said, in an error


class RefusedError(UserError):
    """The server understood and said no; asking again would give the same."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class CircuitBreaker:
    """Stops asking a server that is down, so that a batch of requests fails in seconds and not in hours.

    After ``failures`` failed requests in a row all others fail at once for ``cool_down_seconds``; then one is let
    through, alone and without retries, and decides. Safe to share between threads.
    """

    def __init__(self, *, failures: int, cool_down_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if failures < 1 or cool_down_seconds < 0:
            raise ValueError(
                f"failures_to_open={failures} must be positive, cool_down_seconds={cool_down_seconds} not negative"
            )
        self.failures, self.cool_down_seconds, self._clock = failures, cool_down_seconds, clock
        self._lock = threading.Lock()
        self._failed, self._open_until, self._probing, self._cause = 0, 0.0, False, ""

    @contextmanager
    def request(self) -> Iterator[bool]:
        """Around one request: yields whether it is the probe, and learns how it went.

        Raises:
            RewardUnavailable: not now.
        """
        probe = self._admit()
        cause = ""
        try:
            yield probe
        except RewardUnavailable as error:
            cause = str(error)
            raise
        finally:
            self._settle(cause)

    def _admit(self) -> bool:
        with self._lock:
            if self._failed < self.failures:
                return False
            if self._probing or self._clock() < self._open_until:
                raise RewardUnavailable(self._cause)
            self._probing = True
            return True

    def _settle(self, cause: str) -> None:
        with self._lock:
            self._failed = self._failed + 1 if cause else 0
            self._probing, self._cause = False, cause
            self._open_until = self._clock() + self.cool_down_seconds


class JsonClient:
    """Asks one server; safe to share between threads.

    Args:
        url: ``http://HOST:PORT`` or ``https://...``, with a path before the server's own if it has one.
        most_bytes: of an answer; a longer one is refused.
        timeout_seconds: for a whole answer, once a request is sent, and before that for sending it.
        connect_seconds: for the connection.
        retries: further tries of one request.
        first_pause_seconds: before the first retry; it doubles.
        token_env: environment variable that holds the bearer token; None sends none.
        failures_to_open: failed requests in a row after which the server is taken to be down, see ``CircuitBreaker``.
        cool_down_seconds: for how long.
    """

    def __init__(
        self,
        url: str,
        most_bytes: int = MAX_ANSWER_BYTES,
        *,
        timeout_seconds: float = 120.0,
        connect_seconds: float = 10.0,
        retries: int = 3,
        first_pause_seconds: float = 0.5,
        token_env: str | None = None,
        failures_to_open: int = 3,
        cool_down_seconds: float = 10.0,
    ) -> None:
        if min(timeout_seconds, connect_seconds) <= 0 or min(retries, first_pause_seconds) < 0:
            raise ValueError(
                f"timeout_seconds={timeout_seconds} and connect_seconds={connect_seconds} must be positive,"
                f" retries={retries} and first_pause_seconds={first_pause_seconds} not negative"
            )
        self.url, self.most_bytes = _checked_url(url), most_bytes
        self.timeout_seconds, self.connect_seconds = timeout_seconds, connect_seconds
        self.retries, self.first_pause_seconds = retries, first_pause_seconds
        self._token = read_token(token_env)
        self._breaker = CircuitBreaker(failures=failures_to_open, cool_down_seconds=cool_down_seconds)

    def post(self, path: str, body: bytes) -> Any:
        """Send JSON, get the parsed JSON of a 200.

        Raises:
            RewardUnavailable: no answer in all tries, or the breaker is open.
            UserError: the server refused (``RefusedError``), or what it said is not JSON.
        """
        with self._breaker.request() as probe:
            return self._persistently(path, body, tries=1 if probe else self.retries + 1)

    def _persistently(self, path: str, body: bytes, tries: int) -> Any:
        for attempt in range(tries):
            try:
                return self._once(path, body)
            except RewardUnavailable as error:
                trouble = error
            if attempt + 1 < tries:
                time.sleep(self.pause(attempt, body))
        raise RewardUnavailable(f"{self.url} cannot be reached: {trouble}") from trouble

    def pause(self, attempt: int, body: bytes) -> float:
        """Seconds to wait after try number ``attempt``, from 0."""
        return self.first_pause_seconds * 2**attempt * (0.5 + zlib.crc32(body, attempt) / 2**32)

    def _once(self, path: str, body: bytes) -> Any:
        connection = self._connection()
        try:
            status, content = self._exchange(connection, path, body)
        except (OSError, HTTPException) as error:
            raise RewardUnavailable(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if status >= SERVER_ERROR or status in MAY_PASS:
            raise RewardUnavailable(f"status {status}, {_said(content)}")
        if status != OK:
            raise RefusedError(f"{self.url} refused with status {status}: {_said(content)}", status)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.url} answered something that is not JSON: {_said(content)}. Is this the reward's address?"
            ) from error

    def _connection(self) -> HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None  # checked at construction
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.connect_seconds)

    def _exchange(self, connection: HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection.connect()
        with connection.sock as plain:
            timed = TimedSocket(plain, self.timeout_seconds)
            connection.sock = cast(Any, timed)
            return self._ask(connection, timed, urlsplit(self.url).path + path, body, headers)

    def _ask(
        self, connection: HTTPConnection, timed: TimedSocket, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        # A server that refuses may hang up before it has read everything; what it said can still be read.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, body, headers)
        timed.allow(self.timeout_seconds)
        response = connection.getresponse()
        return response.status, _read(response, self.most_bytes)


def read_token(variable: str | None) -> str | None:
    """The bearer token in an environment variable; None for None.

    Raises:
        UserError: the variable is not set, empty, or holds what cannot stand in a header.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(
            f"token_env={variable!r} must name an environment variable that holds the token, plain text on one line;"
            f" set it with: export {variable}=..."
        )
    remember(token)
    return token


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not close, an impossible host
        usable = False
    if not usable or parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"{redacted(url)!r} is not a server's address; give http://HOST:PORT or https://HOST/PATH")
    if parts.username or parts.password:
        raise UserError("an address with a password in it ends up in logs; put the token in a variable, see token_env")
    return url.rstrip("/")


def _read(response: HTTPResponse, most_bytes: int) -> bytes:
    """The whole body."""
    content = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        content += chunk
        if len(content) > most_bytes:
            raise UserError(f"the answer is longer than {most_bytes} bytes. Is this the reward's address?")
    if response.length:
        raise ConnectionError(f"the answer broke off {response.length} bytes before its end")
    return bytes(content)


def _said(content: bytes) -> str:
    """The server's own words: the ``error`` of its JSON, or the beginning of whatever else it sent."""
    text = content.decode(errors="replace")
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, Mapping) and "error" in parsed:
        error = parsed["error"]
        text = str(error.get("message", error) if isinstance(error, Mapping) else error)
    shown = " ".join(redacted(text).split())[:QUOTED_CHARACTERS]
    return shown or "without a word"
