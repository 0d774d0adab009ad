"""Algorithms as Agent Lightning 0.3 has them: what is attached, ``@algo``, the Baseline and the helpers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.algorithms.base import NotAttachedError
from lightning_ray.algorithms.over_store import StoreOfLoop, attach, run_algorithm
from lightning_ray.store import LocalStoreClient, SpanStore

RESOURCES: Any = {"prompt": lr.PromptTemplate(template="{x}")}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalStoreClient]:
    client = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    yield client
    await client.close()


class Echo(lr.LitAgent[Any]):
    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        if task < 0:
            raise ValueError(f"{task} is below 0")
        return float(task)


async def play(store: Any, algorithm: lr.Algorithm, *datasets: Any) -> list[Any]:
    """Run the algorithm with a runner beside it."""
    algorithm.set_store(store)
    runner = lr.LitAgentRunner(poll_interval=0.05)
    with runner.run_context(agent=Echo(), store=store):
        playing = asyncio.create_task(runner.iter())
        await asyncio.wait_for(run_algorithm(algorithm, *datasets), 20)
        playing.cancel()
    return (await store.query_rollouts()).items


# The base


def test_what_is_attached_is_found_and_what_is_not_is_named(tmp_path: Path) -> None:
    algorithm = lr.Algorithm()
    for get, what in ((algorithm.get_store, "store"), (algorithm.get_adapter, "adapter")):
        with pytest.raises(NotAttachedError, match=rf"Algorithm has no {what}; .* set_{what}\(\)"):
            get()
    with pytest.raises(ValueError, match="no trainer"):
        algorithm.get_trainer()
    assert algorithm.get_llm_proxy() is None and algorithm.get_initial_resources() is None
    trainer = lr.Trainer(initial_resources=RESOURCES, llm_proxy="proxy", adapter=lr.TraceToMessages())
    store: Any = object()
    attach(algorithm, trainer)
    algorithm.set_store(store)
    assert algorithm.get_trainer() is trainer and algorithm.get_store() is store
    assert algorithm.get_initial_resources() == RESOURCES and algorithm.get_llm_proxy() == "proxy"
    assert isinstance(algorithm.get_adapter(), lr.TraceToMessages)
    del trainer
    with pytest.raises(NotAttachedError, match="no trainer"):
        algorithm.get_trainer()


def test_an_algorithm_without_a_run_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"Algorithm does not define run\(train_dataset, val_dataset\)"):
        lr.Algorithm().run()
    with pytest.raises(NotImplementedError, match="GRPO does not define run"):
        lr.GRPO(model="m").run()


def test_settings_may_be_algorithms_too() -> None:
    class Mine(lr.AlgorithmSettings):
        beams: int = 4

        async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None: ...

    mine = Mine(beams=2)
    attach(mine, lr.Trainer())
    mine.set_store("store")  # type: ignore[arg-type]
    assert mine.settings() == {"beams": 2} and mine.is_async() and mine.get_store() == "store"
    with pytest.raises(lr.ConfigError, match=r"algorithm.beam=1: .*did you mean 'beams'"):
        Mine(beam=1)
    assert lr.Algorithm().settings() == {} and not lr.Algorithm().is_async()


# @algo


async def test_a_function_gets_what_it_names() -> None:
    given: dict[str, Any] = {}

    @lr.algo
    async def everything(
        *, store: Any, train_dataset: Any, val_dataset: Any, llm_proxy: Any, adapter: Any, initial_resources: Any
    ) -> None:
        """Doc."""
        given.update(store=store, train_dataset=train_dataset, val_dataset=val_dataset, llm_proxy=llm_proxy)
        given.update(adapter=adapter, initial_resources=initial_resources)

    attach(everything, lr.Trainer(initial_resources=RESOURCES))
    everything.set_store("store")  # type: ignore[arg-type]
    await run_algorithm(everything, [1], [2])
    adapter = given.pop("adapter")
    assert isinstance(adapter, lr.TracerTraceToTriplet)
    assert given == {
        "store": "store",
        "train_dataset": [1],
        "val_dataset": [2],
        "llm_proxy": None,
        "initial_resources": RESOURCES,
    }
    assert everything.is_async() and everything.__name__ == "everything" and everything.__doc__ == "Doc."


async def test_a_sync_function_is_run_and_called_as_one() -> None:
    @lr.algo
    def half(train_dataset: Any) -> int:
        seen.append(train_dataset)
        return 3

    seen: list[Any] = []
    assert not half.is_async() and half(train_dataset=[5]) == 3
    await run_algorithm(half, [1], None)
    assert seen == [[5], [1]]
    with pytest.raises(TypeError, match="'half' has no parameter 'val_dataset'"):
        half.run([1], [2])


async def test_a_function_that_wants_what_is_not_there_fails_by_name() -> None:
    @lr.algo
    async def wanting(store: Any) -> None: ...

    with pytest.raises(NotAttachedError, match="has no store"):
        await run_algorithm(wanting, None, None)


# The Baseline


async def test_the_baseline_plays_every_task_of_both_sets_in_each_epoch(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning_ray.algorithms.fast")
    baseline = lr.Baseline(n_epochs=2, polling_interval=0.05, max_queue_length=1, span_verbosity="key_values")
    baseline.set_initial_resources(RESOURCES)
    baseline.set_adapter(lr.TracerTraceToTriplet())
    played = await play(store, baseline, [0, 1, -1], [7])
    assert [(r.input, r.mode) for r in played] == 2 * [(0, "train"), (1, "train"), (-1, "train"), (7, "val")]
    assert [r.status for r in played[:4]] == ["succeeded", "succeeded", "failed", "succeeded"]
    assert {r.resources_id for r in played} == {"default"}
    assert "epoch 2 of 2: 4 tasks" in caplog.text and "agentlightning.reward.0.value" in caplog.text
    assert "failed after" in caplog.text and "adapted:" in caplog.text
    train, val = baseline.summary()["train"], baseline.summary()["val"]
    assert (train["tasks"], train["rollouts"], train["reward"], train["failures"]) == (3, 6, 0.5, {"agent_failed": 2})
    assert (val["tasks"], val["rollouts"], val["reward"], val["failed"]) == (1, 2, 7.0, 0)


async def test_the_baseline_without_a_task_is_refused(store: Any) -> None:
    with pytest.raises(lr.ConfigError, match="nothing to play"):
        await play(store, lr.Baseline(), [], None)


@pytest.mark.parametrize("bad", [{"train_split": 0.0}, {"train_split": 1.0}, {"span_verbosity": "all"}])
def test_bad_settings_of_the_baseline_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(lr.ConfigError, match=next(iter(bad))):
        lr.Baseline(**bad)


# Helpers


class Proxy:
    def __init__(self, running: bool = False):
        self.running, self.told = running, list[str]()

    def is_running(self) -> bool:
        return self.running

    async def start(self) -> None:
        self.told.append("start")

    def stop(self) -> None:
        self.told.append("stop")


class Helped(lr.Algorithm):
    @lr.with_llm_proxy()
    @lr.with_store
    async def both(self, store: Any, llm_proxy: Any, more: int) -> Any:
        return store, llm_proxy, more

    @lr.with_llm_proxy(required=True, auto_start=False)
    async def needing(self, llm_proxy: Any) -> Any:
        return llm_proxy


async def test_store_and_proxy_are_put_in() -> None:
    helped, proxy = Helped(), Proxy()
    helped.set_store("store")  # type: ignore[arg-type]
    assert await helped.both(more=3) == ("store", None, 3)
    with pytest.raises(NotAttachedError, match="Helped needs a proxy"):
        await helped.needing()
    helped.set_llm_proxy(proxy)
    assert await helped.both(more=3) == ("store", proxy, 3) and proxy.told == ["start", "stop"]
    assert await helped.needing() is proxy and proxy.told == ["start", "stop"]
    helped.set_llm_proxy(running := Proxy(running=True))
    await helped.both(more=1)
    assert running.told == []


def test_batches_never_end_and_have_no_task_twice() -> None:
    batches = list(islice(lr.batch_iter_over_dataset([1, 2, 3, 4, 5], 2), 50))
    assert all(len(set(batch)) == 2 for batch in batches)
    assert sorted(task for batch in batches for task in batch) == sorted([1, 2, 3, 4, 5] * 20)
    assert all(sorted(batch) == [1, 2] for batch in islice(lr.batch_iter_over_dataset([1, 2], 8), 3))
    with pytest.raises(ValueError, match="out of 0 tasks"):
        next(lr.batch_iter_over_dataset([], 1))


async def test_a_store_of_a_loop_is_used_from_other_threads(store: Any) -> None:
    shared = StoreOfLoop(store, asyncio.get_running_loop())
    one = await shared.enqueue_rollout(1)
    other = await asyncio.to_thread(lambda: asyncio.run(shared.enqueue_rollout(2)))
    assert [r.rollout_id for r in await store.query_rollouts()] == [one.rollout_id, other.rollout_id]
    assert shared.capabilities["thread_safe"]
