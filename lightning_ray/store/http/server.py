"""The store's HTTP API without Ray: uvicorn in the caller's event loop, for laptops and tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn

from lightning_ray.errors import ConfigError
from lightning_ray.store.base import Store
from lightning_ray.store.http.app import StoreApi
from lightning_ray.store.http.bodies import MAX_BODY_BYTES

_GRACE_SECONDS = 5


@contextlib.asynccontextmanager
async def serve(
    store: Store, host: str = "127.0.0.1", port: int = 0, *, token: str, max_body_bytes: int = MAX_BODY_BYTES
) -> AsyncIterator[str]:
    """Serve ``store`` while the context is open; gives the address. ``port`` 0 is any that is free.

    Raises ConfigError if the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows that it may send at once; without, answers wait 40 ms for the peer's ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    app = StoreApi(store, token, max_body_bytes=max_body_bytes)
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait([task, started := asyncio.ensure_future(server.is_up.wait())], return_when="FIRST_COMPLETED")
    started.cancel()
    if task.done():
        task.result()
    name = f"[{host}]" if family == socket.AF_INET6 else host
    try:
        yield f"http://{name}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


class _Server(uvicorn.Server):
    """Says when it is up, and leaves the process's signal handlers alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
