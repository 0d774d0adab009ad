"""The implementations of the store that the contract is tested against, by name, and the Ray that some need.

Each is an async context manager that gives an empty store: no rollouts, and whatever workers and resources
earlier tests left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.own_ray import OwnRay
from lightning_ray.store import LocalStoreClient, SpanStore, Store, StoreClient
from lightning_ray.store.http.client import HttpStoreClient
from lightning_ray.store.http.server import serve
from lightning_ray.store.shards import ShardedStore


@dataclass
class Place:
    """Where a store can live: a folder of the test, a Ray that is started when it is first asked for, and what
    implementations keep for all tests of a file.
    """

    folder: Path
    ray: Callable[[], Any]
    kept: dict[str, Any] = field(default_factory=dict)


Opener = Callable[[Place], AbstractAsyncContextManager[Store]]


@asynccontextmanager
async def core(place: Place) -> AsyncIterator[Store]:
    """In this process."""
    client = LocalStoreClient(SpanStore(place.folder))
    yield client
    await client.close()


@asynccontextmanager
async def actor(place: Place) -> AsyncIterator[Store]:
    """On one Ray actor for all tests."""
    place.ray()
    if "actor" not in place.kept:
        from actors.span_store import start

        place.kept["actor"] = start(place.folder, "contract")
    client = StoreClient(place.kept["actor"])
    yield client
    await empty(client)


@asynccontextmanager
async def shards(place: Place) -> AsyncIterator[Store]:
    """Three stores of this process behind one client."""
    clients = [LocalStoreClient(SpanStore(place.folder / f"shard-{shard}")) for shard in range(3)]
    yield ShardedStore(clients)
    for client in clients:
        await client.close()


@asynccontextmanager
async def http(place: Place) -> AsyncIterator[Store]:
    """Behind the HTTP API, in this process."""
    local = LocalStoreClient(SpanStore(place.folder))
    async with serve(local, token="secret") as address:
        client = HttpStoreClient(address, "secret")
        yield client
        await client.close()
    await local.close()


STORES: dict[str, Opener] = {"core": core, "actor": actor, "shards": shards, "http": http}


async def empty(store: Store) -> None:
    """Remove all rollouts."""
    await store.delete_rollouts([rollout.rollout_id for rollout in await store.query_rollouts()])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray for the tests of one file."""
    ray = pytest.importorskip("ray")
    own = OwnRay.start(lambda _: {}, {"num_cpus": 4, "log_to_driver": False})
    yield ray
    own.end()


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What implementations keep for all tests of a file."""
    return {}


@pytest.fixture(params=sorted(STORES))
async def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kept: dict[str, Any]
) -> AsyncIterator[Store]:
    """Each implementation in turn."""
    place = Place(tmp_path_factory.mktemp("store"), lambda: request.getfixturevalue("cluster"), kept)
    async with STORES[request.param](place) as opened:
        yield opened
