"""Capture in front of other endpoints (hosted models, judges, other servers) as a Ray Serve deployment.

    LIGHTNING_RAY_SECRET=... serve run deployments.relay:app name=my-store namespace=my-run upstreams=upstreams.toml

``upstreams.toml`` has a table for each, with the fields of ``lightning_ray.Upstream``::

    [judge]
    base_url = "https://api.example.com/v1"
    model = "large"
    api_key_env = "JUDGE_KEY"

A run starts its own for ``Trainer(relays=...)``. There is one replica, so that limits and spend hold for all calls;
what was spent before it began is read from the span store. The app itself is ``lightning_ray.relay.app``'s.
"""

from __future__ import annotations

import asyncio
import os
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from deployments.lifetime import CHECK_SECONDS, end_with
from deployments.store_api import StoreApiSettings, connect
from lightning_ray.config import build
from lightning_ray.errors import ConfigError
from lightning_ray.metrics.relay import report_relay
from lightning_ray.relay.app import RelayApp
from lightning_ray.relay.restoring import spent_before
from lightning_ray.relay.settings import Upstream, check_upstreams
from lightning_ray.store.base import Store
from lightning_ray.store.schema import spans_to_batch

SECRET_VARIABLE = "LIGHTNING_RAY_SECRET"


class RelaySettings(BaseModel):
    """Arguments of ``app``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """The store's actor; its shards are ``{name}-0``, ``{name}-1``, ..."""
    namespace: str | None = None
    """Ray's namespace of the actor; this one's if it is not given."""
    shards: int = Field(default=1, ge=1)
    upstreams: Path
    """The TOML file."""
    secret_file: Path | None = None
    """What attempt keys are signed with. The variable LIGHTNING_RAY_SECRET goes first."""


@serve.deployment(
    name="relay",
    max_ongoing_requests=8192,
    max_queued_requests=-1,
    graceful_shutdown_timeout_s=5,
    health_check_period_s=CHECK_SECONDS,
)
@serve.ingress()
class Relay:
    """The only replica. One of a ``run`` ends with it, and has metrics of its name."""

    def __init__(self, upstreams: Mapping[str, Upstream], store: Store, secret: bytes, run: str | None = None):
        self.store = store
        self.run = run
        self._reporting: asyncio.Task[None] | None = None
        self.relay = RelayApp(upstreams, secret, self._append, partial(spent_before, store))

    async def __serve_build_asgi_app__(self) -> RelayApp:
        """The app, in the replica's event loop."""
        if self.run is not None:
            self._reporting = asyncio.create_task(report_relay(self.run, self.relay.status))
        return self.relay

    async def _append(self, rows: list[dict[str, Any]]) -> None:
        await self.store.append_spans(spans_to_batch(rows), synced=False)

    async def check_health(self) -> None:
        """When its run is gone, its application is deleted."""
        if self.run is not None:
            await end_with(self.store.actors)

    async def status(self) -> dict[str, Any]:
        """As ``GET /status``."""
        return await self.relay.status()


def app(args: RelaySettings) -> serve.Application:
    """Build the application. Raises ConfigError for bad upstreams, without a secret, and if the store is not there."""
    store = connect(StoreApiSettings(name=args.name, namespace=args.namespace, shards=args.shards))
    return bind(read_upstreams(args.upstreams), store, find_secret(args.secret_file))


def bind(upstreams: Mapping[str, Upstream], store: Store, secret: bytes, run: str | None = None) -> serve.Application:
    """The application; one of a ``run`` (its name) ends with it. Keys in this process's environment go along."""
    check_upstreams(upstreams)
    deployment: Any = Relay
    known = {name: upstream.with_key() for name, upstream in upstreams.items()}
    return deployment.options(ray_actor_options={"num_cpus": 0}).bind(known, store, secret, run)


def read_upstreams(path: Path) -> dict[str, Upstream]:
    """The upstreams of a TOML file. Raises ConfigError."""
    try:
        tables = tomllib.loads(path.expanduser().read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"upstreams={str(path)!r} cannot be read: {error}") from None
    if not tables:
        raise ConfigError(f"upstreams={str(path)!r} names none; write a table, for instance [judge]")
    return {name: build(Upstream, table, name) for name, table in tables.items()}


def find_secret(secret_file: Path | None) -> bytes:
    """The secret of the environment, or of the file. Raises ConfigError."""
    secret = os.environ.get(SECRET_VARIABLE, "").strip()
    if not secret and secret_file is not None:
        try:
            secret = secret_file.expanduser().read_text().strip()
        except OSError as error:
            raise ConfigError(f"secret_file={str(secret_file)!r} cannot be read: {error.strerror}") from error
    if len(secret) < 16:
        raise ConfigError(f"set {SECRET_VARIABLE} or secret_file=PATH to 16 characters or more that attempt keys need")
    return secret.encode()
