"""Running an endpoint in uvicorn: signals, the end, and options for TLS."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from jax_chunkattn.server.app import LOOPBACK, make_app
from jax_chunkattn.server.endpoint import Endpoint
from jax_chunkattn.server.tls import check_tls

BACKLOG = 2048  # connections that wait to be accepted
STOPPING_SECONDS = 5.0  # for clients to read the end of what the server has ended


@dataclass(frozen=True)
class Serving:
    """How an endpoint is served.

    Attributes:
      host: address to listen at; without keys it must be this machine's own.
      port: 0 takes one that is free.
      grace: seconds that answers may go on when the server is to stop.
      keep_alive: seconds that a connection may be idle.
      hosts: names that clients may call it by; None allows all where there are keys, and else
        those of this machine.
      certificate, private_key: for TLS; files that uvicorn reads.

    Raises:
      TLSError: they cannot be used.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace: float = 30.0
    keep_alive: int = 30
    hosts: Collection[str] | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self):
        if self.certificate is not None:
            check_tls(self.certificate, self.private_key)

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


class Server(uvicorn.Server):
    """Serves one endpoint until it is told to stop, by a signal or by `stop`."""

    def __init__(self, endpoint: Endpoint, serving: Serving = Serving(), *, keyed: bool = False):
        self._endpoint = endpoint
        self._serving = serving
        self._loop: asyncio.AbstractEventLoop | None = None
        hosts = serving.hosts
        if hosts is None and not keyed and serving.is_loopback:
            hosts = LOOPBACK
        super().__init__(
            uvicorn.Config(
                make_app(endpoint, hosts=hosts),
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                backlog=BACKLOG,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=serving.keep_alive,
                timeout_graceful_shutdown=int(serving.grace + STOPPING_SECONDS),
                ssl_certfile=serving.certificate,
                ssl_keyfile=serving.private_key,
            )
        )

    def run_until_stopped(
        self, on_listening: Callable[[str], None], at: socket.socket | None = None
    ) -> None:
        """Listens, calls `on_listening` with the address, and serves.

        The first Ctrl-C, or SIGTERM, has it stop when what runs has ended or `grace` is over; the
        second at once.

        Args:
          at: a socket of `bound_to`, which stays open; None makes one.

        Raises OSError when it cannot listen there.
        """
        with contextlib.ExitStack() as stack:
            at = at or stack.enter_context(bound_to(self._serving.host, self._serving.port))
            at.listen(BACKLOG)
            host, port = at.getsockname()[:2]
            scheme = "https" if self._serving.certificate else "http"
            shown = f"[{host}]" if ":" in host else host
            on_listening(f"{scheme}://{shown}:{port}")
            asyncio.run(self._serve_at(at))

    async def _serve_at(self, at: socket.socket) -> None:
        loop = self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.stop)
        await self.serve(sockets=[at])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: `run_until_stopped` has."""
        yield

    def stop(self) -> None:
        """As a signal; from any thread."""
        self._endpoint.drain()
        if self.should_exit and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._end_at_once)
        self.should_exit = True

    def _end_at_once(self) -> None:
        """As if all clients had gone. What uvicorn's `force_exit` leaves is an error of each."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for task in list(self.server_state.tasks):
            task.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what has not ended by itself while connections are waited for."""
        ending = asyncio.create_task(self._endpoint.finish(self._serving.grace))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


@contextlib.contextmanager
def bound_to(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address; who comes before somebody listens at it is turned away.

    Raises OSError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows that it must not wait to send small pieces (Nagle).
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as at:
        at.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        at.bind((host, port))
        yield at
