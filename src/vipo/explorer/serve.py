"""The explorer on this machine's loopback: nobody else's page may ask it, and it asks nothing of a network itself."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from vipo.errors import UserError
from vipo.explorer.start import Opening
from vipo.report.watch import HOST, NAMES

FINISH_SECONDS = 1  # requests under way at the end get so long


def serve(opening: Opening, port: int, told: Callable[[str], object]) -> None:
    """Serve the explorer until Ctrl-C; ``told`` is given its address.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: the extra is not installed, or the port is taken.
    """
    try:
        import nicegui  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"vipo maps --ui needs NiceGUI ({error}): pip install 'vipo[ui]'") from error
    from vipo.explorer.page import application

    with taken(port) as listening:
        served = OnlyHere(application(opening))
        config = uvicorn.Config(served, log_level="error", access_log=False, timeout_graceful_shutdown=FINISH_SECONDS)
        told(f"http://{HOST}:{listening.getsockname()[1]}/")
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            return


def taken(port: int) -> socket.socket:
    """A socket that listens on loopback.

    Raises:
        UserError: another one does.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"port {port} of {HOST} cannot be had: {error}; take another with --port, 0 for any") from error
    return listening


class OnlyHere:
    """An ASGI application for browsers that ask for this machine by its own name, from a page of this server."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self.application = application

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope.get("headers", ())}
        if scope["type"] == "lifespan" or asked_here(headers.get("host", ""), headers.get("origin")):
            await self.application(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})


def asked_here(host: str, origin: str | None) -> bool:
    """Whether a request names this machine, and comes from no other site's page."""
    named = urlsplit(f"//{host}")
    return named.hostname in NAMES and (origin is None or urlsplit(origin).netloc == host)
