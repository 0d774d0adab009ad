"""One policy deployment, on real Ray, Serve and vLLM, for all frameworks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings
from lightning_ray.types import ProxyLLM
from tests.e2e.wire.served import MODEL, Served, serve
from tests.tool_model import TOOL_PARSER, kept_tool_model

SETTINGS = EngineSettings(max_model_len=512, kv_cache_memory_mb=16, tool_parser=TOOL_PARSER)


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def served(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """The deployment, and where agents find it: it answers the same each time."""
    model = kept_tool_model(pytestconfig.cache.mkdir("tool-model"))  # type: ignore[union-attr]
    cluster = Cluster()
    try:
        served = await serve(model, tmp_path_factory.mktemp("store"), cluster, SETTINGS)
        llm = ProxyLLM(endpoint=f"{served.root}/v1", model=MODEL, sampling_parameters={"temperature": 0.0})
        await served.store.update_resources("greedy", {"main_llm": llm})
        yield served
    finally:
        await cluster.stop()
