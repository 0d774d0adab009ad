"""Algorithms of one's own: how they are declared, and what a session settles; the run beneath is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lightning_ray as lr
from lightning_ray.algorithms.base import NotAttachedError
from lightning_ray.algorithms.over_store import run_algorithm
from lightning_ray.algorithms.session import TrainingSession
from lightning_ray.launch import Launch, launched
from lightning_ray.run.folder import RunFolder
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.join import ModelCall, join_calls
from lightning_ray.types import Rollout
from tests.docs_code import blocks


def episode(rollout_id: str, reward: float | None, version: int = 0, status: Any = "succeeded") -> Episode:
    call = ModelCall(
        np.array([1, 2], np.int32), np.array([3], np.int32), np.array([-0.5], np.float32), np.array([version], np.int32)
    )
    metadata = {"group_id": rollout_id.split("-")[0], "weight_version": version}
    rollout = Rollout(rollout_id=rollout_id, input={}, start_time=0.0, status=status, metadata=metadata)
    return Episode(rollout, join_calls([call]), reward, calls=1, sampled_tokens=1)


class StandIn:
    """What of a run a session talks to; updates tell the batch that they got."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self.state = SimpleNamespace(step=0, flow={})
        self.policy = SimpleNamespace(version=0)
        self.ready: dict[str, Episode] = {}
        self.batches: list[Any] = []
        self.recorded: list[Any] = []
        self.saved: list[Any] = []
        self.validated = 0

    async def wait_for(self, ids: Any) -> None: ...

    async def read(self, ids: Any) -> list[Episode]:
        return [self.ready[each] for each in ids]

    async def update(self, batch: Any) -> dict[str, Any]:
        self.batches.append(batch)
        return {"trained_tokens": float(batch.num_rows), "seconds": 1.0, "loss": float(len(self.batches))}

    def check_tokens(self, account: Any, max_staleness: int) -> None: ...

    async def publish(self, version: int) -> None:
        self.policy.version = version

    def record_step(self, step: int, played: Any, updates: Any, times: Any) -> None:
        self.recorded.append((played, updates))
        self.state.step = step + 1

    async def trace_step(self, step: int, played: Any, times: Any) -> None: ...

    async def validate(self) -> None:
        self.validated += 1

    async def checkpoint(self) -> None:
        self.saved.append((self.state.step, dict(self.state.flow["memory"])))


def session(folder: Path, **settings: Any) -> tuple[TrainingSession, StandIn]:
    run = StandIn(folder)
    algorithm = lr.TrainingAlgorithm(**{"model": "m", "steps": 10, "validate_every": 0, **settings})
    made = TrainingSession(algorithm, run)  # type: ignore[arg-type]
    made.begin()
    return made, run


async def play(made: TrainingSession, run: StandIn, *episodes: Episode) -> list[Episode]:
    run.ready |= {each.rollout_id: each for each in episodes}
    return await made.episodes([each.rollout_id for each in episodes])


async def test_given_advantages_are_what_is_trained_on_and_kept(tmp_path: Path) -> None:
    made, run = session(tmp_path)
    played = await play(made, run, episode("a-0", 1.0), episode("a-1", 1.0), episode("b-0", 0.0), episode("b-1", None))
    told = await made.train(played[:3], [0.5, -0.5, 2.0])
    [batch] = run.batches
    assert batch["rollout_id"].to_pylist() == ["a-0", "a-1", "b-0"] and batch["advantage"].to_pylist() == [0.5, -0.5, 2]
    assert told["loss"] == 1.0 and await made.publish() == 1
    [(recorded, updates)] = run.recorded
    assert [each.rollout_id for each in recorded.account.trained] == ["a-0", "a-1", "b-0"]
    assert recorded.account.dropped == {"b-1": "no_reward"} and len(recorded.episodes) == 4
    assert updates["policy"]["trained_tokens"] == 3.0
    [line] = [json.loads(text) for text in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert line["advantages"] == {"a-0": 0.5, "a-1": -0.5, "b-0": 2.0} and line["trained"] == 3


async def test_without_advantages_groups_are_settled_as_batch_has_it(tmp_path: Path) -> None:
    made, run = session(tmp_path)
    played = await play(made, run, *(episode(f"{g}-{i}", float(i * (g == "a"))) for g in "ab" for i in range(2)))
    await made.train(played)
    assert run.batches[0]["rollout_id"].to_pylist() == ["a-0", "a-1"] and "advantage" not in run.batches[0].column_names
    await made.publish()
    assert run.recorded[0][0].account.dropped == {"b-0": "no_variance", "b-1": "no_variance"}
    assert "advantages" not in (tmp_path / "steps.jsonl").read_text()
    played = await play(made, run, *(episode(f"c-{i}", float(i), version=1) for i in range(2)))
    await made.train(played)
    with pytest.raises(lr.ConfigError, match=r"with advantages and without in one step"):
        await made.train(played, [1.0, 2.0])


async def test_a_rollout_is_settled_once(tmp_path: Path) -> None:
    made, run = session(tmp_path)
    played = await play(made, run, *(episode(f"a-{i}", 1.0) for i in range(3)))
    await made.train(played[:2], [1.0, 1.0])
    await made.train(played[1:2], [2.0])
    await made.publish()
    recorded, updates = run.recorded[0]
    assert [each.rollout_id for each in recorded.account.trained] == ["a-0", "a-1"]
    assert recorded.account.dropped == {"a-2": "not_chosen"}
    assert updates["policy"]["trained_tokens"] == 3.0 and updates["policy"]["loss"] == 2.0
    with pytest.raises(lr.ConfigError, match=r"rollout a-2 \(1 in all\), which an earlier step settled"):
        await made.train(played[2:], [1.0])
    with pytest.raises(lr.ConfigError, match="no rollout was played in it"):
        await made.publish()


async def test_with_staleness_rollouts_wait_as_long_as_they_may_be_trained(tmp_path: Path) -> None:
    made, run = session(tmp_path, max_staleness=1)
    first = await play(made, run, *(episode(f"a-{i}", 1.0) for i in range(3)))
    await made.train(first[:1], [1.0])
    await made.publish()
    assert len(run.recorded[0][0].episodes) == 1, "two may still be trained on"
    second = await play(made, run, episode("b-0", 1.0, version=1))
    await made.train([first[1], second[0]], [1.0, 1.0])
    await made.publish()
    assert run.recorded[1][0].account.dropped == {"a-2": "not_chosen"}
    assert [each.rollout_id for each in run.recorded[1][0].account.trained] == ["a-1", "b-0"]


async def test_a_step_without_an_update_swaps_nothing(tmp_path: Path) -> None:
    made, run = session(tmp_path, steps=1)
    played = await play(made, run, episode("a-0", 1.0, status="failed"))
    assert await made.train(played, [1.0]) == {} and await made.publish() == 0
    assert run.recorded[0][0].account.dropped == {"a-0": "agent_failed"} and run.recorded[0][1] == {}
    assert run.saved == [(1, {})], "the last step is kept"


async def test_a_step_validates_and_saves_as_often_as_the_settings_say(tmp_path: Path) -> None:
    made, run = session(tmp_path, validate_every=1, checkpoint_every=2)
    for number in range(2):
        made.memory["seen"] = number
        await made.train(await play(made, run, episode(f"a{number}-0", 1.0, version=number)), [1.0])
        await made.publish()
    assert run.validated == 2 and run.saved == [(2, {"seen": 1})]


async def test_bad_calls_are_refused_by_name(tmp_path: Path) -> None:
    made, run = session(tmp_path)
    played = await play(made, run, episode("a-0", 1.0))
    with pytest.raises(lr.ConfigError, match="1 episodes and 2 advantages"):
        await made.train(played, [1.0, 2.0])
    with pytest.raises(lr.ConfigError, match="rollout a-0 got the advantage nan"):
        await made.train(played, [float("nan")])
    with pytest.raises(lr.ConfigError, match="0 tasks, 8 times each"):
        await made.play([])


async def test_a_function_with_a_model_declares_settings() -> None:
    given: dict[str, Any] = {}

    @lr.algo(model="m", steps=3)
    async def mine(session: Any, train_dataset: Any) -> None:
        """Doc."""
        given.update(session=session, train_dataset=train_dataset)

    assert isinstance(mine, lr.TrainingAlgorithm) and type(mine).__name__ == "mine" and mine.__doc__ == "Doc."
    assert mine.settings()["steps"] == 3 and mine.is_async()
    with pytest.raises(NotAttachedError, match="mine has no session"):
        await run_algorithm(mine, [1], None)
    with launched(Launch(settings={"algorithm.steps": 5})):
        again = lr.Trainer(algorithm=mine).algorithm
    assert isinstance(again, lr.TrainingAlgorithm) and again.steps == 5
    again.set_session("session")  # type: ignore[arg-type]
    await run_algorithm(again, [1], None)
    assert given == {"session": "session", "train_dataset": [1]}
    with pytest.raises(lr.ConfigError, match="did you mean 'steps'"):
        lr.algo(model="m", stepz=3)(given.update)


def test_a_replay_knows_an_algorithm_of_ones_own_by_its_base(tmp_path: Path) -> None:
    from lightning_ray.replay.settings import recorded, settings_of

    class Mine(lr.TrainingAlgorithm):
        width: int = 3

    made = Mine(model="m", group_size=1, loss="gpg", learning_rate=0.5)
    config = {"algorithm": {"name": "Mine", **made.settings()}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    again = settings_of(recorded(tmp_path), tmp_path)
    assert (again.loss, again.learning_rate, again.model) == ("gpg", 0.5, "m")


def test_an_algorithm_that_trains_is_async() -> None:
    @lr.algo(model="m")
    def mine(session: Any) -> None: ...

    with pytest.raises(lr.ConfigError, match="mine trains weights and is not async"):
        mine.check(SimpleNamespace())  # type: ignore[arg-type]


def test_the_store_only_algorithm_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lightning_ray.cli import main

    (tmp_path / "search.py").write_text(blocks("algorithms.md")[0])
    monkeypatch.chdir(tmp_path)
    assert main(["train", "search.py"]) == 0
    assert "best: Say it aloud: {word}" in capsys.readouterr().out
    summary = json.loads(Path("runs/search/summary.json").read_text())
    assert summary["rollouts_by_status"] == {"succeeded": 4}
