"""Trying out an agent in this process, and a runner that is driven by hand."""

from __future__ import annotations

import bdb
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.decorator import algo
from lightning_ray.algorithms.fast import Baseline, FastAlgorithm
from lightning_ray.dev import DevRollout, FirstOf, NotFastError, show
from lightning_ray.stepper import LitAgentRunner
from lightning_ray.store import LocalStoreClient, SpanStore, open_folder

PROMPT = {"prompt": lr.PromptTemplate(template="Say {word}")}


@lr.rollout
async def echo(task: dict[str, Any], prompt_template: lr.PromptTemplate) -> float:
    if task.get("fails"):
        raise ValueError("the agent has a bug")
    lr.emit_message(prompt_template.format(word=task["word"]))
    return len(task["word"])


def words(count: int) -> list[dict[str, Any]]:
    return [{"word": "x" * number} for number in range(count)]


class Noting(lr.Hook):
    def __init__(self) -> None:
        self.moments: list[str] = []
        self.given: dict[str, Any] = {}

    async def on_rollout_start(self, **given: Any) -> None:
        self.moments.append("on_rollout_start")

    async def on_trace_start(self, **given: Any) -> None:
        self.moments.append("on_trace_start")

    async def on_trace_end(self, **given: Any) -> None:
        self.moments.append("on_trace_end")

    async def on_rollout_end(self, **given: Any) -> None:
        self.moments.append("on_rollout_end")
        self.given = given


# Trainer.dev


def test_tasks_are_played_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    hook = Noting()
    trainer = lr.Trainer(initial_resources=PROMPT, hooks=hook)
    played = trainer.dev(echo, [*words(3), {"fails": True}], val_dataset=words(1))
    assert [one.rollout.mode for one in played] == ["train"] * 4 + ["val"]
    assert [one.reward for one in played] == [0.0, 1.0, 2.0, None, 0.0]
    assert [one.error for one in played] == [None, None, None, "ValueError: the agent has a bug", None]
    assert [span.name for span in played[1].spans] == ["agentlightning.message", "agentlightning.annotation"]
    assert played[1].spans[0].attributes["agentlightning.message.body"] == "Say x"
    assert played[3].spans[0].attributes["exception.type"].endswith("ValueError")
    assert hook.moments[:4] == ["on_rollout_start", "on_trace_start", "on_trace_end", "on_rollout_end"]
    assert set(hook.given) == {"agent", "runner", "rollout", "spans"} and hook.given["agent"] is echo
    told = capsys.readouterr().out
    assert "5 rollouts" in told and "ValueError" in told and "succeeded" in told


def test_the_first_ten_tasks_are_tried_unless_told_otherwise() -> None:
    trainer = lr.Trainer(initial_resources=PROMPT)
    assert len(trainer.dev(echo, words(12))) == 10
    assert len(trainer.dev(echo, words(5), tasks=2)) == 2
    assert len(lr.Trainer(initial_resources=PROMPT, max_rollouts=3).dev(echo, words(5))) >= 3


def test_a_sync_agent_is_called_in_this_thread() -> None:
    where: list[threading.Thread] = []

    @lr.rollout
    def agent(task: Any, prompt_template: lr.PromptTemplate) -> float:
        where.append(threading.current_thread())
        return 1.0

    lr.Trainer(initial_resources=PROMPT).dev(agent, [1, 2])
    assert where == [threading.main_thread()] * 2


def test_leaving_the_debugger_leaves_dev() -> None:
    @lr.rollout
    def agent(task: Any, prompt_template: lr.PromptTemplate) -> float:
        raise bdb.BdbQuit

    with pytest.raises(bdb.BdbQuit):
        lr.Trainer(initial_resources=PROMPT).dev(agent, [1, 2])


DEBUGGED = """
import lightning_ray as lr
from tests.test_dev import PROMPT

@lr.rollout
{kind} agent(task: str, prompt_template: lr.PromptTemplate) -> float:
    reward = 1.0
    breakpoint()
    return reward

[played] = lr.Trainer(initial_resources=PROMPT).dev(agent, ["a"])
print("reward", played.reward)
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_breakpoint_stops_in_the_agent(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEBUGGED.format(kind=kind)],
        input="p task\nreward = 7.0\ncontinue\n",
        env={name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"},  # Ray sets it
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "(Pdb) 'a'" in done.stdout and "reward 7.0" in done.stdout


def test_the_folder_keeps_the_rollouts(tmp_path: Path) -> None:
    [played] = lr.Trainer(initial_resources=PROMPT).dev(echo, words(1), folder=tmp_path / "store")
    view = open_folder(tmp_path / "store")
    assert [r.rollout_id for r in view.query_rollouts()] == [played.rollout.rollout_id]


def test_the_class_agent_has_its_trainer_and_runner() -> None:
    seen: list[Any] = []

    class Agent(lr.LitAgent[Any]):
        async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            seen.append((self.trainer, self.runner, list(resources)))
            return 1.0

    trainer = lr.Trainer(initial_resources=PROMPT)
    trainer.dev(Agent(), [0])
    assert seen[0][0] is trainer and isinstance(seen[0][1], LitAgentRunner) and seen[0][2] == ["prompt"]


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": body["messages"][-1]["content"].upper()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "c-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        encoded = json.dumps({**answer, "key": self.headers["authorization"]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_any_endpoint_will_do_and_its_calls_are_traced() -> None:
    from openai import AsyncOpenAI

    @lr.rollout
    async def agent(task: str, llm: lr.LLM) -> float:
        client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
        answer = await client.chat.completions.create(model=llm.model, messages=[{"role": "user", "content": task}])
        return float(answer.choices[0].message.content == task.upper())

    with endpoint() as url:
        resources = {"main_llm": lr.LLM(endpoint=url, model="any", api_key="mine")}
        played = lr.Trainer(initial_resources=resources).dev(agent, ["hello"])
    assert [one.reward for one in played] == [1.0]
    assert "openai.chat.completion" in [span.name for span in played[0].spans]


def test_an_algorithm_of_ones_own_is_played_with() -> None:
    adapted: list[Any] = []

    class Twice(FastAlgorithm):
        async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
            store = self.get_store()
            rollouts = [await store.enqueue_rollout(train_dataset[0]) for _ in range(2)]
            ended = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in rollouts])
            adapted.append((len(ended), self.get_initial_resources(), type(self.get_adapter()).__name__))

    @lr.rollout
    async def agent(task: Any, prompt_template: lr.PromptTemplate | None = None) -> float:
        return 1.0

    class Plain(lr.LitAgent[Any]):
        async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

    trainer = lr.Trainer(algorithm=Twice(), initial_resources=PROMPT)
    assert len(trainer.dev(Plain(), [1])) == 2
    assert adapted == [(2, PROMPT, "TracerTraceToTriplet")] and trainer.algorithm.get_trainer() is trainer


def test_a_sync_algorithm_uses_the_store_from_its_thread_and_what_it_left_queued_is_played() -> None:
    import asyncio

    class Queueing(FastAlgorithm):
        def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
            for task in train_dataset:
                asyncio.run(self.get_store().enqueue_rollout(task))

    class Plain(lr.LitAgent[Any]):
        def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return float(task)

    assert [one.reward for one in lr.Trainer(algorithm=Queueing()).dev(Plain(), [1, 2])] == [1.0, 2.0]


def test_a_failing_algorithm_ends_dev() -> None:
    class Broken(FastAlgorithm):
        async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        lr.Trainer(algorithm=Broken(), initial_resources=PROMPT).dev(echo, words(1))


def test_what_dev_cannot_do_is_refused() -> None:
    with pytest.raises(NotFastError, match=r"by default Baseline.*GRPO"):
        lr.Trainer(algorithm=lr.GRPO(model="m")).dev(echo, words(1))
    with pytest.raises(TypeError):
        lr.Trainer(algorithm=algo(lambda store: None)).dev(echo, words(1))
    with pytest.raises(lr.ConfigError, match=r"'prompt_template', and there is no PromptTemplate; give one"):
        lr.Trainer().dev(echo, words(1))
    with pytest.raises(lr.ConfigError, match="decorate the function"):
        lr.Trainer().dev(lambda task: 1.0, words(1))  # type: ignore[arg-type]
    with pytest.raises(lr.ConfigError, match="nothing to play"):
        lr.Trainer(initial_resources=PROMPT).dev(echo, [])


def test_a_long_task_has_one_line() -> None:
    rollout = lr.Rollout(rollout_id="r", input={"text": "a\nb" * 500}, start_time=0.0, status="failed")
    console = Console(file=io.StringIO(), width=150)
    show([DevRollout(rollout, [])], console)
    assert "failed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_of_a_data_set() -> None:
    first = FirstOf([1, 2, 3], 2)
    assert list(first) == [1, 2] and first[-1] == 2 and first[:5] == [1, 2] and len(FirstOf([1], 5)) == 1


# Trainer's arguments


@pytest.mark.parametrize(
    ("name", "hint"),
    [("n_runner", "did you mean 'n_runners'"), ("n_workers", "'n_runners'"), ("initial_resource", "initial_resources")],
)
def test_an_unknown_argument_is_named(name: str, hint: str) -> None:
    with pytest.raises(lr.ConfigError, match=f"{name}=3.*{hint}"):
        lr.Trainer(**{name: 3})


def test_arguments_of_agent_lightning_are_accepted() -> None:
    with pytest.warns(UserWarning, match="strategy='shm' has no effect"):
        trainer = lr.Trainer(
            algorithm=Baseline(),
            n_runners=1,
            max_rollouts=4,
            tracer=lr.AgentOpsTracer(),
            hooks=[Noting()],
            strategy="shm",
        )
    assert trainer.max_rollouts == 4 and isinstance(trainer.tracer, lr.AgentOpsTracer) and len(trainer.hooks) == 1
    assert isinstance(trainer.adapter, lr.TracerTraceToTriplet) and trainer.adapter is trainer.adapter
    with pytest.warns(DeprecationWarning):
        lr.Trainer(dev=True)
    with pytest.raises(lr.ConfigError, match="needs an algorithm"):
        lr.Trainer().fit(echo, words(1))


# The runner that is driven by hand


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalStoreClient]:
    client = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    yield client
    await client.close()


async def test_a_step_plays_one_task(store: Any) -> None:
    runner, hook = LitAgentRunner(lr.OtelTracer()), Noting()
    with runner.run_context(agent=echo, store=store, hooks=[hook]) as same:
        assert same is runner
        rollout = await runner.step({"word": "abc"}, resources=PROMPT, mode="val")
        assert (rollout.status, rollout.mode) == ("succeeded", "val")
        assert lr.find_final_reward((await store.query_spans(rollout.rollout_id)).items) == 3.0
        with pytest.raises(ValueError, match="the agent has a bug"):
            await runner.step({"fails": True}, resources=PROMPT)
        again = await runner.step({"word": "ab"})
        assert again.status == "succeeded"
    failed = (await store.query_rollouts(status_in=["failed"])).items
    assert len(failed) == 1 and hook.moments.count("on_rollout_end") == 3
    with pytest.raises(lr.ConfigError, match="run_context"):
        await runner.step({"word": ""})


async def test_a_step_that_returns_nonsense_raises(store: Any) -> None:
    class Agent(lr.LitAgent[Any]):
        def rollout(self, task: Any, resources: Any, rollout: Any) -> Any:
            return "nonsense"

    runner = LitAgentRunner()
    with runner.run_context(agent=Agent(), store=store), pytest.raises(lr.AgentError, match="nonsense"):
        await runner.step(1)


async def test_iter_plays_the_queue(store: Any) -> None:
    await store.update_resources("r", PROMPT)
    queued = [await store.enqueue_rollout({"word": "x" * n, "fails": n == 1}) for n in range(4)]
    runner = LitAgentRunner(max_rollouts=3)
    with runner.run_context(agent=echo, store=store, worker_id=7):
        await runner.iter()
    ended = [(await store.get_rollout_by_id(one.rollout_id)).status for one in queued]
    assert ended == ["succeeded", "failed", "succeeded", "queuing"]
    assert (await store.get_worker_by_id("stepper-7")) is not None
    event = threading.Event()
    event.set()
    with runner.run_context(agent=echo, store=store):
        await runner.iter(event=event)
    assert (await store.get_rollout_by_id(queued[3].rollout_id)).status == "queuing"


def test_a_store_of_ones_own_may_be_used_again(tmp_path: Path) -> None:
    import asyncio

    store = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    trainer = lr.Trainer(initial_resources=PROMPT, store=store)
    first, second = trainer.dev(echo, words(2)), trainer.dev(echo, words(3))
    assert (len(first), len(second)) == (2, 3)
    assert len(asyncio.run(store.query_rollouts())) == 5
    with pytest.raises(lr.ConfigError, match="a store of its own"):
        lr.Trainer(algorithm=Baseline(), store=store).fit(echo, words(1))
    asyncio.run(store.close())
