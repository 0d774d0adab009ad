"""The prompt search over a real store and real runners. The optimising model is scripted, over real HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from tests.apo_parts import SEED, SMALL, TRAIN, VAL, search, state_of
from tests.scripted_model import ScriptedModel, kind_of, part, wishes


async def test_a_beam_finds_the_words_that_were_wanted(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=4, **SMALL)
        played = await search(tmp_path, apo, TRAIN, VAL)
    state = state_of(apo)
    assert set(apo.get_best_prompt().template.split()) == {"Do", "{task}", "red", "blue", "green"}
    assert (state.seed_score, state.best_score, state.round) == (0.0, 1.0, 4)
    assert {body["model"] for body in model.bodies} == {"gpt-5-mini", "gpt-4.1-mini"}
    assert {body["temperature"] for body in model.bodies} == {1.0}
    assert len(played) == state.rollouts and {r.mode for r in played} == {"train", "val"}
    assert state.usage.calls == len(model.bodies) and state.usage.prompt_tokens == 100 * len(model.bodies)
    seen = [(r.resources_id, r.input) for r in played if r.mode == "val"]
    assert len(seen) == len(set(seen)), "no candidate plays a validation task twice"


async def test_the_search_of_0_3_by_its_numbers(tmp_path: Path) -> None:
    """A round: a parent for each place of the beam, branch_factor edits of each, all on one validation batch."""
    count = iter(range(100))

    def ever_new(body: dict[str, Any]) -> str:
        if kind_of(body) == "critique":
            return "go on"
        return f"{part(body['messages'][0]['content'], 'instructions')} w{next(count)}"

    with ScriptedModel(ever_new) as model:
        apo = lr.APO[str](model.client(), beam_rounds=2, run_initial_validation=False, **SMALL)
        played = await search(tmp_path, apo, TRAIN, VAL)
    state = state_of(apo)
    assert [len(one.made) for one in state.history] == [4, 4]
    assert len([r for r in played if r.mode == "train"]) == 2 * (2 * 2) * 2, "2 rounds, 4 branches, batches of 2"
    first = {r.input for r in played if r.mode == "val" and r.resources_id == "v1"}
    for version in ("v0", "v2", "v3", "v4"):
        batch = {r.input for r in played if r.mode == "val" and r.resources_id == version}
        assert first <= batch or batch <= first, "one batch for all, and the leader on the others"
    assert len(model.asked("critique")) == len(model.asked("edit")) == 8
    assert (state.best, state.seed_score) == ("v0", None), "no edit was strictly better"
    assert apo.get_best_prompt() == SEED["prompt_template"]


async def test_candidates_of_a_round_are_played_at_the_same_time(tmp_path: Path) -> None:
    at_once, most = set(), [0]

    @lr.rollout
    async def slow(task: str, prompt_template: lr.PromptTemplate, rollout: lr.Rollout) -> float:
        at_once.add((rollout.resources_id, rollout.mode))
        most[0] = max(most[0], len({version for version, mode in at_once if mode == "val"}))
        await asyncio.sleep(0.02)
        at_once.discard((rollout.resources_id, rollout.mode))
        return 0.5

    def differing(body: dict[str, Any]) -> str:
        return f"{{task}} {len(model.bodies)}" if kind_of(body) == "edit" else "c"

    for limit, least in ((None, 2), (1, 1)):
        most[0] = 0
        with ScriptedModel(differing) as model:
            apo = lr.APO[str](model.client(), beam_rounds=1, candidates_at_once=limit, **{**SMALL, "val_batch_size": 1})
            await search(tmp_path / str(limit), apo, TRAIN, VAL, slow)
        assert most[0] >= least and (limit is None or most[0] == 1)


async def test_the_search_stops_at_the_target(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=9, target_score=0.6, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL)
    state = state_of(apo)
    assert state.round < 9 and state.best_score >= 0.6 and state.stopped == "target_score=0.6 is reached"


@pytest.mark.parametrize("seed", range(4))
async def test_a_candidate_that_met_the_wrong_tasks_may_be_found_again(seed: int, tmp_path: Path) -> None:
    with ScriptedModel(lambda body: "Do {task} red" if kind_of(body) == "edit" else "go on") as model:
        settings = {**SMALL, "beam_width": 1, "val_batch_size": 1}
        apo = lr.APO[str](model.client(), beam_rounds=2, seed=seed, **settings)
        await search(tmp_path, apo, TRAIN, ["red", "blue"])
    state = state_of(apo)
    assert list(state.candidates) == ["v0", "v1"] and (state.best, state.best_score) == ("v1", 0.5)


async def test_several_templates_take_turns(tmp_path: Path) -> None:
    resources: Any = {
        "plan": lr.PromptTemplate(template="Plan {task}"),
        "write": lr.PromptTemplate(template="Write {{ text }}", engine="jinja"),
        "judge": lr.LLM(endpoint="http://127.0.0.1:1/v1", model="m"),
    }

    class Two(lr.LitAgent[str]):
        async def rollout_async(self, task: str, resources: Any, rollout: Any) -> float:
            assert resources["judge"].model == "m"
            both = [("plan", "red"), ("write", "blue")]
            for name, word in both:
                if word not in resources[name].template:
                    lr.emit_message(f"wanted: {word}")
            return sum(word in resources[name].template for name, word in both) / 2

    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=4, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL, Two(), resources)
    best = apo.get_best_prompts()
    assert list(best) == ["plan", "write"] and "red" in best["plan"].template and "blue" in best["write"].template
    assert best["write"].engine == "jinja" and apo.get_best_prompt("write") == best["write"]
    for candidate in state_of(apo).candidates.values():
        if candidate.parents:
            parent = state_of(apo).candidates[candidate.parents[0]]
            differing = [name for name in best if candidate.templates[name] != parent.templates[name]]
            assert differing == list(candidate.changed) and len(differing) == 1
    assert {"plan", "write"} == {name for c in state_of(apo).candidates.values() for name in c.changed}
    assert any('"write"' in question and "{{ text }}" in question for question in model.asked("critique"))
