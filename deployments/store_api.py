"""The store's HTTP API as a Ray Serve deployment, over the named actor (or the shards) of a run.

    LIGHTNING_RAY_STORE_TOKEN=... serve run deployments.store_api:app name=my-store namespace=my-run

Invariant: it is never served without a token. The API itself is ``store.http.app``'s; replicas hold nothing, so
that any number of them may serve one store.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from lightning_ray.errors import ConfigError
from lightning_ray.store.base import Store
from lightning_ray.store.client import StoreClient
from lightning_ray.store.http.app import StoreApi
from lightning_ray.store.http.bodies import MAX_BODY_BYTES
from lightning_ray.store.http.client import TOKEN_VARIABLE
from lightning_ray.store.shards import ShardedStore


class StoreApiSettings(BaseModel):
    """Arguments of ``app``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """The store's actor; its shards are ``{name}-0``, ``{name}-1``, ..."""
    namespace: str | None = None
    """Ray's namespace of the actor; this one's if it is not given."""
    shards: int = Field(default=1, ge=1)
    token_file: str | None = None
    """Where the token is, or is written (for the owner's eyes alone) if there is none. The variable
    LIGHTNING_RAY_STORE_TOKEN goes first.
    """
    replicas: int = Field(default=1, ge=1)
    max_body_bytes: int = Field(default=MAX_BODY_BYTES, ge=1)


@serve.deployment(name="store_api", max_ongoing_requests=4096, max_queued_requests=-1, graceful_shutdown_timeout_s=5)
@serve.ingress()
class StoreApiServer:
    """One replica."""

    def __init__(self, store: Store, token: str, max_body_bytes: int):
        self.store = store
        self.token = token
        self.max_body_bytes = max_body_bytes

    async def __serve_build_asgi_app__(self) -> StoreApi:
        """The app, in the replica's event loop."""
        return StoreApi(self.store, self.token, max_body_bytes=self.max_body_bytes)


def app(args: StoreApiSettings) -> serve.Application:
    """Build the application. Raises ConfigError if the actor is not there or no token is given."""
    token = find_token(args.token_file)
    deployment: Any = StoreApiServer
    return deployment.options(num_replicas=args.replicas).bind(connect(args), token, args.max_body_bytes)


def connect(args: StoreApiSettings) -> Store:
    """The client of the named actor, or of its shards."""
    if args.shards == 1:
        return _client(args.name, args.namespace)
    return ShardedStore([_client(f"{args.name}-{shard}", args.namespace) for shard in range(args.shards)])


def find_token(token_file: str | None) -> str:
    """The token of the environment, or of the file, which is made if it does not exist. Raises ConfigError."""
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    if token_file is None:
        raise ConfigError(f"the store is not served without a token: set {TOKEN_VARIABLE}, or give token_file=PATH")
    path = Path(token_file).expanduser().absolute()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if not token:
            raise ConfigError(f"the token file {path} is empty; delete it, and a new one is made") from None
        return token
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be made: {error.strerror}") from error
    with os.fdopen(handle, "w") as file:
        file.write(token := secrets.token_urlsafe(32))
    print(f"the store's token is in {path}")
    return token


def _client(name: str, namespace: str | None) -> StoreClient:
    try:
        return StoreClient(ray.get_actor(name, namespace))
    except ValueError as error:
        where = f"namespace {namespace!r}" if namespace else "this namespace"
        raise ConfigError(f"there is no store named {name!r} in {where}; start it with actors.span_store") from error
