"""A server from its socket to its end."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from urllib.parse import quote

import uvicorn

from instaflow.errors import ConfigError, InstaFlowError
from instaflow.interruption import Stop
from instaflow.serving.app import Service
from instaflow.serving.connection import Connection
from instaflow.serving.painter import Painter

GRACE = 1
"""Seconds for answers under way when the server is told to stop."""
CONNECTIONS = 256
"""Where so many are open, uvicorn answers 503 itself."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that will listen there; port 0 takes a free one. Raises ConfigError, InstaFlowError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"'--host' {host!r} is no address of this machine: {error}", "Try 127.0.0.1") from error
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen()
    except OSError as error:
        taken.close()
        hint = "Choose another by --port; --port 0 takes a free one"
        if error.errno == errno.EADDRNOTAVAIL:
            hint = "--host is an address of this machine: 127.0.0.1, or 0.0.0.0 for all it has"
        raise InstaFlowError(f"Port {port} of {host} cannot be had: {os.strerror(error.errno or 0)}", hint) from error
    return taken


def is_local(taken: socket.socket) -> bool:
    """Whether it can be reached from this machine alone."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback


def url_of(taken: socket.socket, token: str | None) -> str:
    """Where a browser finds it: by its address, or by the machine's name where it has any of the machine's."""
    address, port = taken.getsockname()[:2]
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        address = socket.gethostname()
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


class Server(uvicorn.Server):
    """Ends when `stop` says so; who hears signals is the command."""

    def __init__(self, config: uvicorn.Config, stop: Stop, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self.stop, self.closing = stop, closing

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        if self.stop():
            self.closing()
            return True
        return await super().on_tick(counter)


def serve(
    painter: Painter, thread: Executor, taken: socket.socket, *, host: str, token: str | None, stop: Stop
) -> None:
    """Answer what is asked at a socket, until told to stop. `thread` has one thread, in which all is drawn."""
    hosts = {host.lower(), taken.getsockname()[0]} if is_local(taken) else None
    asyncio.run(_serve(painter, thread, taken, hosts, token, stop))


async def _serve(
    painter: Painter, thread: Executor, taken: socket.socket, hosts: set[str] | None, token: str | None, stop: Stop
) -> None:
    service = Service(painter, thread, hosts=hosts, token=token)
    config = uvicorn.Config(
        service.app,
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nobody may say in a header where a request comes from
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    drawing = asyncio.create_task(service.turns.run())
    await Server(config, stop, service.turns.close).serve(sockets=[taken])
    drawing.cancel()
