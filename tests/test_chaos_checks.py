"""The chaos benchmark's checks see a loss and a double when there is one, and none when there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_agent import write_note
from benchmarks.chaos_checks import check, noise
from lightning_ray.run.folder import RunFolder
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.store.schema import spans_to_batch

GOOD = {"lost_rollouts": 0, "duplicate_rollouts": 0, "lost_acknowledged_spans": 0, "steps_missing": 0}


class Played:
    """A run's folder with one rollout, played and trained on."""

    def __init__(self, folder: Path):
        self.folder = RunFolder(folder / "run")
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.ids: dict[str, str] = {}

    async def make(self) -> None:
        store = LocalStoreClient(SpanStore(self.folder.store))
        begun = await store.start_rollout({}, mode="train")
        self.ids = {"rollout_id": begun.rollout_id, "attempt_id": begun.attempt.attempt_id}
        await self.append(store, name="call", sampled_ids=[1, 2], prompt_ids=[0], logprobs=[0.0, 0.0])
        await self.append(store, name="reward", reward=1.0)
        await store.finish_attempt(*self.ids.values(), status="succeeded")
        await store.close()
        self.note([1, 2])
        self.settle(0)

    async def append(self, store: LocalStoreClient, name: str, **columns: Any) -> None:
        row = {**self.ids, "sequence_id": 0, "trace_id": "0" * 32, "span_id": name.ljust(16, "0"), "status": "OK"}
        await store.append_spans(spans_to_batch([{**row, "name": name, **columns}]))

    def note(self, ids: list[int]) -> None:
        write_note(self.notes, {"attempt": self.ids["attempt_id"], "ids": ids})

    def settle(self, step: int) -> None:
        groups = [["gr", [self.ids["rollout_id"]]]]
        with (self.folder.path / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "groups": groups}) + "\n")

    def found(self, finished: dict[str, str] | None = None) -> dict[str, Any]:
        found = check(self.folder, self.notes, finished or {}, [])
        return {name: found[name] for name in GOOD}


@pytest.fixture
async def played(tmp_path: Path) -> Played:
    played = Played(tmp_path)
    await played.make()
    return played


async def test_nothing_is_lost(played: Played) -> None:
    assert played.found({played.ids["rollout_id"]: played.ids["attempt_id"]}) == GOOD


async def test_an_answer_that_the_store_does_not_have_is_lost(played: Played) -> None:
    played.note([1, 2])
    played.note([3])
    assert played.found() == {**GOOD, "lost_acknowledged_spans": 2}, "the same ids twice are two answers"


async def test_a_good_end_that_is_not_known_any_more_is_lost(played: Played) -> None:
    assert played.found({"ro-other": "at-other"}) == {**GOOD, "lost_rollouts": 1}
    assert played.found({played.ids["rollout_id"]: "at-other"}) == {**GOOD, "lost_rollouts": 1}


async def test_a_rollout_that_goes_on_for_ever_is_lost(played: Played) -> None:
    store = LocalStoreClient(SpanStore(played.folder.store))
    await store.enqueue_rollout({})
    await store.close()
    assert played.found() == {**GOOD, "lost_rollouts": 1}


async def test_a_rollout_in_two_steps_counts_twice_and_a_step_may_be_missing(played: Played) -> None:
    played.settle(2)
    assert played.found() == {**GOOD, "duplicate_rollouts": 1, "steps_missing": 1}


async def test_two_rewards_of_one_attempt_count_twice(played: Played) -> None:
    store = LocalStoreClient(SpanStore(played.folder.store))
    await played.append(store, name="again", reward=1.0)
    await store.close()
    assert played.found() == {**GOOD, "duplicate_rollouts": 1}


def test_noise_of_two_means() -> None:
    assert noise(1.0, 1.0, 100) == pytest.approx(0.03)
    assert noise(0.5, 0.5, 100) == pytest.approx(1.96 * 0.5 * 2**0.5 / 10)
