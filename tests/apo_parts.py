"""A search over a real store with real runners in this process; the optimising model is scripted (scripted_model)."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

import lightning_ray as lr
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.trackers import Trackers

TRAIN = ["red", "blue", "red green", "blue green"]
VAL = ["red", "blue", "green", "red blue", "blue green", "red blue green"]
SMALL: dict[str, Any] = {"beam_width": 2, "branch_factor": 2, "gradient_batch_size": 2, "val_batch_size": 3}
SEED: Any = {"prompt_template": lr.PromptTemplate(template="Do {task}")}


@lr.rollout
async def wisher(task: str, prompt_template: lr.PromptTemplate) -> float:
    """Rewarded by the share of the task's words that stand in its prompt; notes those that do not."""
    wanted = task.split()
    words = re.findall(r"\w+", prompt_template.template)
    for word in wanted:
        if word not in words:
            lr.emit_message(f"wanted: {word}")
    return sum(word in words for word in wanted) / len(wanted)


@asynccontextmanager
async def playing(folder: Path, agent: Any, runners: int = 2) -> AsyncIterator[LocalStoreClient]:
    """A store with runners at work on it."""
    store = LocalStoreClient(SpanStore(folder, fsync="none"))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        tasks = []
        for number in range(runners):
            runner = lr.LitAgentRunner(poll_interval=0.05)
            stack.enter_context(runner.run_context(agent=agent, store=store, worker_id=number))
            tasks.append(asyncio.create_task(runner.iter()))
        try:
            yield store
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def search(
    folder: Path,
    apo: lr.APO[Any],
    train: Any,
    val: Any,
    agent: Any = wisher,
    resources: Any = SEED,
    timeout: float = 60,
) -> Any:
    """Run it over the store in a folder; returns all rollouts of the store."""
    async with playing(folder, agent) as store:
        apo.set_store(store)
        apo.set_adapter(lr.TraceToMessages())
        apo.set_initial_resources(resources)
        try:
            await asyncio.wait_for(apo.run(train, val), timeout)
        finally:
            await apo.async_openai_client.close()
        return (await store.query_rollouts()).items


def in_folder(apo: lr.APO[Any], folder: RunFolder, resume: bool = False) -> Console:
    """Let it have a run's folder, reports and trackers, without Ray; returns the console of the reports."""
    console = Console(width=160, file=io.StringIO(), record=True)
    reporter = Reporter(console)
    trainer = lr.Trainer()
    trainer.resume = resume
    folder.create(resume)
    apo.set_trainer(trainer)
    apo._of_run = SimpleNamespace(  # type: ignore[assignment]
        folder=folder, reporter=reporter, trackers=Trackers(folder.path, reporter.note), keep_alive=trainer
    )
    return console


def state_of(apo: lr.APO[Any]) -> Any:
    return apo._outcome.state
