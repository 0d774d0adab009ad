"""A store of its own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lightning_ray import runner as runner_module
from lightning_ray.running import rest as rest_module
from lightning_ray.store import SpanStore
from lightning_ray.store import service as service_module
from tests.runner.parts import ENDPOINT, Counting


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(rest_module, "FIRST_SECONDS", 0.01)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Counting]:
    client = Counting(SpanStore(tmp_path, fsync="none"))
    await client.update_resources("sampled", {"main_llm": ENDPOINT})
    yield client
    await client.close()


@pytest.fixture
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HEARTBEAT_SECONDS", 0.02)
