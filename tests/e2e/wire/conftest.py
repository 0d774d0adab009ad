"""One deployment, and one server of vLLM's own beside it, for all tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from lightning_ray.cluster import Cluster
from tests.e2e.wire.reference import Reference
from tests.e2e.wire.served import MODEL, SETTINGS, Served, serve
from tests.tool_model import kept_tool_model


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Path:
    """The tool model with reasoning, taught once and kept for as long as its script is the same."""
    return kept_tool_model(request.config.cache.mkdir("tool-model"), reasoning=True)


@pytest.fixture(scope="package")
def starting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """vLLM's own server on its way up."""
    reference = Reference(model, MODEL, SETTINGS, tmp_path_factory.mktemp("vllm") / "log")
    yield reference
    reference.stop()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def served(model: Path, tmp_path_factory: pytest.TempPathFactory, starting: Reference) -> AsyncIterator[Served]:
    """The deployment; vLLM's own server comes up meanwhile."""
    cluster = Cluster()
    try:
        yield await serve(model, tmp_path_factory.mktemp("store"), cluster)
    finally:
        await cluster.stop()


@pytest.fixture(scope="package")
def reference(starting: Reference, served: Served) -> Reference:
    """vLLM's own server, which answers."""
    starting.wait()
    return starting
