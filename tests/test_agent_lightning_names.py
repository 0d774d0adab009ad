"""Scripts for Agent Lightning 0.3 find its names: what they call is there, or says what stands in its place."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.store.base import Store

GONE = [
    "VERL",
    "LLMProxy",
    "LightningStoreServer",
    "LightningStoreThreaded",
    "ExecutionStrategy",
    "ClientServerExecutionStrategy",
    "SharedMemoryExecutionStrategy",
    "lightning_cli",
    "AgentLightningServer",
    "AgentLightningClient",
    "DevTaskLoader",
]


@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_says_what_stands_in_its_place(name: str) -> None:
    with pytest.raises(ImportError, match=f"lightning_ray has no {name}: "):
        getattr(lr, name)
    code = f"from lightning_ray import {name}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr
    assert f"lightning_ray has no {name}: " in told


def test_every_public_name_is_there() -> None:
    assert [name for name in lr.__all__ if not hasattr(lr, name)] == [] and len(set(lr.__all__)) == len(lr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        lr.Nonsense  # noqa: B018


@lr.rollout
async def shout(task: str, llm: lr.LLM) -> float:
    return float(len(task))


async def test_a_store_in_memory_is_enough_to_step_an_agent() -> None:
    store = lr.InMemoryLightningStore()
    assert isinstance(store, lr.LightningStore) and lr.LightningStore is Store
    runner = lr.LitAgentRunner[str](lr.OtelTracer(), interval_jitter=0.1)
    with runner.run_context(agent=shout, store=store):
        rollout = await runner.step("abc", resources={"main_llm": lr.LLM(endpoint="http://127.0.0.1:1", model="none")})
    assert lr.find_final_reward((await store.query_spans(rollout.rollout_id)).items) == 3.0
    await store.close()
    assert store._folder.name not in map(str, Path(tempfile.gettempdir()).glob("lightning-ray-*"))  # noqa: ASYNC240


def test_a_client_of_a_store_wants_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_RAY_STORE_TOKEN", raising=False)
    with pytest.raises(lr.ConfigError, match="set LIGHTNING_RAY_STORE_TOKEN"):
        lr.LightningStoreClient("http://127.0.0.1:4747")
    monkeypatch.setenv("LIGHTNING_RAY_STORE_TOKEN", "secret")
    client = lr.LightningStoreClient("http://127.0.0.1:4747", request_timeout=3.0)
    assert client.otlp_traces_endpoint() == "http://127.0.0.1:4747/v1/traces"


def test_the_runners_of_a_strategy_count() -> None:
    assert lr.Trainer(strategy={"type": "cs", "n_runners": 5}).n_runners == 5
    with pytest.warns(UserWarning, match="strategy='shm' has no effect"):
        lr.Trainer(strategy="shm")


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    """The library's, one below it, and another; put back afterwards."""
    found = [logging.getLogger(name) for name in ("lightning_ray", "lightning_ray.store", "another")]
    before: list[Any] = [(each.level, list(each.handlers), each.propagate) for each in found]
    yield found
    for each, (level, handlers, propagate) in zip(found, before, strict=True):
        each.setLevel(level)
        each.handlers, each.propagate = handlers, propagate


def test_logs_go_to_the_console_and_to_files(
    loggers: list[logging.Logger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, below, another = loggers
    file = tmp_path / "logs" / "all.txt"
    for _ in range(2):
        lr.setup_logging("WARNING", color=False, files=str(file), apply_to=["another"])
    own.info("too small")
    below.warning("from below")
    another.error("from another")
    told = capsys.readouterr().err
    assert told.count("WARNING lightning_ray.store: from below") == 1 and "too small" not in told
    assert told.count("ERROR another: from another") == 1
    assert file.read_text().count("from below") == 1
    assert not own.propagate and not another.propagate


def test_one_part_of_the_library_may_log_more(loggers: list[logging.Logger]) -> None:
    own, below, another = loggers
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[method-assign]
    lr.setup_logging(logging.ERROR, console=False, extra_handlers=[handler], submodule_levels={below.name: "DEBUG"})
    own.warning("no")
    below.debug("yes")
    assert [record.getMessage() for record in kept] == ["yes"]
    with pytest.warns(DeprecationWarning, match="call setup_logging"):
        assert lr.configure_logger(logging.INFO, "another").level == logging.INFO
    below.disabled = another.disabled = False
    lr.setup_logging("INFO", console=False, disable_existing_loggers=True)
    silenced, another.disabled = another.disabled, False
    assert silenced and not below.disabled
    with pytest.raises(ValueError, match="LOUD"):
        lr.setup_logging("LOUD")
