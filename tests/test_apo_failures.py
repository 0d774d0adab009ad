"""What fails while a prompt search goes on: the agent, the infrastructure, time, rewards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import lightning_ray as lr
from lightning_ray.errors import InfrastructureError
from tests.apo_parts import SMALL, TRAIN, VAL, search, state_of, wisher
from tests.scripted_model import ScriptedModel, kind_of, wishes


async def test_failures_of_the_agent_count_as_nothing_earned(tmp_path: Path) -> None:
    @lr.rollout
    async def failing(task: str, prompt_template: lr.PromptTemplate) -> float:
        if "red" not in prompt_template.template:
            lr.emit_message("wanted: red")
            raise ValueError("no red")
        return 1.0

    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=1, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL, failing)
    assert (state_of(apo).seed_score, state_of(apo).best_score) == (0.0, 1.0) and state_of(apo).masked == 0


class Breaking(lr.LitAgent[str]):
    """Fails by the infrastructure on "blue", the first ``times`` times in each candidate."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.seen = times, dict[str, int]()

    async def rollout_async(self, task: str, resources: Any, rollout: Any) -> float:
        if task == "blue":
            key = rollout.resources_id
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= self.times:
                raise InfrastructureError("the node is gone")
        return await wisher.rollout_async(task, resources, rollout)


async def test_failures_of_the_infrastructure_are_never_a_score(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=2, infrastructure_retries=0, **SMALL)
        await search(tmp_path / "masked", apo, ["red"], ["red", "blue"], Breaking(10**6))
        state = state_of(apo)
        assert state.masked >= 2 and state.best_score == 1.0, "blue counts nowhere: red alone decides"
        assert all(1 not in candidate.rewards for candidate in state.candidates.values())

        apo = lr.APO[str](model.client(), beam_rounds=1, **SMALL)
        with pytest.raises(InfrastructureError, match=r"no rollout of the seed counts.*the node is gone.*resume"):
            await search(tmp_path / "all", apo, ["red"], ["blue"], Breaking(10**6))


async def test_an_agents_model_whose_money_is_spent_is_no_score(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: 402 if kind_of(body) == "other" else wishes(body)) as model:

        @lr.rollout
        def asker(task: str, prompt_template: lr.PromptTemplate) -> float:
            client = OpenAI(base_url=model.url, api_key="none", max_retries=0)
            client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "hello"}])
            return 1.0

        apo = lr.APO[str](model.client(), infrastructure_retries=0, **SMALL)
        with pytest.raises(InfrastructureError, match=r"no rollout of the seed counts.*scripted 402"):
            await search(tmp_path, apo, TRAIN, ["red"], asker)


async def test_rollouts_that_the_infrastructure_failed_are_played_again(tmp_path: Path) -> None:
    attempts = 1 + 5  # the store's own retries of one rollout are used up before it fails
    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=1, **SMALL)
        agent = Breaking(attempts)
        played = await search(tmp_path, apo, ["red"], ["red", "blue"], agent)
    state = state_of(apo)
    assert state.masked == 0 and set(state.candidates["v0"].rewards) == {0, 1}
    assert len([r for r in played if (r.resources_id, r.input) == ("v0", "blue")]) == 2


async def test_what_is_not_done_in_time_is_cancelled_and_left_out(tmp_path: Path) -> None:
    @lr.rollout
    async def endless(task: str, prompt_template: lr.PromptTemplate) -> float:
        await asyncio.sleep(60 if task == "never" else 0)
        return 0.5

    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=1, rollout_batch_timeout=2.0, **SMALL)
        played = await search(tmp_path, apo, ["quick"], ["quick", "never"], endless)
    assert {r.input: r.status for r in played if r.mode == "val"} == {"quick": "succeeded", "never": "cancelled"}
    assert state_of(apo).seed_score == 0.5 and state_of(apo).masked == 1


async def test_an_agent_without_rewards_is_named(tmp_path: Path) -> None:
    @lr.rollout
    async def silent(task: str, prompt_template: lr.PromptTemplate) -> None: ...

    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), **SMALL)
        with pytest.raises(lr.AgentError, match="no reward in any of 6 rollouts"):
            await search(tmp_path, apo, TRAIN, VAL, silent)
