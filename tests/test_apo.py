"""The prompt search over a real store and real runners. The optimising model is scripted, over real HTTP."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import lightning_ray as lr
from lightning_ray.algorithms.apo.candidates import Candidate, ancestors, common_ancestor
from lightning_ray.algorithms.apo.pareto import changed_by_one, pareto_front, wins
from lightning_ray.algorithms.apo.writer import template_in, what_is_wrong
from lightning_ray.algorithms.base import NotAttachedError
from lightning_ray.errors import InfrastructureError
from tests.apo_parts import SEED, search, wisher
from tests.scripted_model import ScriptedModel, kind_of, part, wishes

TRAIN = ["red", "blue", "red green", "blue green"]
VAL = ["red", "blue", "green", "red blue", "blue green", "red blue green"]
SMALL: dict[str, Any] = {"beam_width": 2, "branch_factor": 2, "gradient_batch_size": 2, "val_batch_size": 3}


def state_of(apo: lr.APO[Any]) -> Any:
    return apo._outcome.state


# The search


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


# What critiques see


async def test_a_critique_sees_what_was_said_noted_and_rewarded(tmp_path: Path) -> None:
    def talking(body: dict[str, Any]) -> str:
        return "I would say five" if kind_of(body) == "other" else wishes(body)  # type: ignore[return-value]

    with ScriptedModel(talking) as model:

        @lr.rollout
        def asker(task: str, prompt_template: lr.PromptTemplate) -> float:
            client = OpenAI(base_url=model.url, api_key="none", max_retries=0)
            message: Any = {"role": "user", "content": prompt_template.format(task=task)}
            client.chat.completions.create(model="agent", messages=[message])
            lr.emit_annotation({"grader": "too vague"})
            lr.emit_reward({"right": 0.25, "short": 0.75}, primary_key="right")
            if task == "fall":
                raise KeyError("the table is gone")
            return 0.25

        for show in (True, False):
            apo = lr.APO[str](model.client(), beam_rounds=1, show_errors=show, **SMALL)
            await search(tmp_path / str(show), apo, ["fall"], ["stand"], asker)
            question = model.asked("critique")[-1]
            assert "user: Do fall" in question and "assistant: I would say five" in question
            assert "grader: too vague" in question and "right 0.25, short 0.75" in question
            assert ("KeyError: 'the table is gone'" in question) == show
    assert state_of(apo).seed_score == 0.25


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


# The optimising model


@pytest.mark.parametrize(
    ("engine", "before", "after", "wrong"),
    [
        ("f-string", "{a} {b}", "{a}", r"it lost \{b\}"),
        ("f-string", "{a}", "{a} {c[x]}", r"nothing fills in \{c\}"),
        ("f-string", "{a}", '{a} {"x": 1}', "no name"),
        ("f-string", "{a}", "{a} {", "no format string"),
        ("f-string", "{a}", "{a} {{x}}", None),
        ("f-string", "{a.b}", "{a[0]:>{w}}", r"nothing fills in \{w\}"),
        ("jinja", "{{ a }}", "{% for x in a %}{{ x }}{% endfor %}", None),
        ("jinja", "{{ a }}", "{{ b }}", r"it lost \{\{ a \}\}"),
        ("jinja", "{{ a }}", "{{ a", "no Jinja"),
        ("poml", "<p>{{ a }}</p>", "<p>b</p>", "it lost"),
        ("f-string", "{a}", "{a}", "changes nothing"),
        ("f-string", "{a}", " ", "empty"),
    ],
)
def test_what_cannot_stand_in_for_a_template(engine: Any, before: str, after: str, wrong: str | None) -> None:
    found = what_is_wrong(after, lr.PromptTemplate(template=before, engine=engine), [before])
    if wrong is None:
        assert found is None
    else:
        assert found is not None and re.search(wrong, found)


@pytest.mark.parametrize(
    ("answer", "template"),
    [
        ("Sure.\n<template>\na {b}\n</template>\nDone", "a {b}"),
        ("<template>x</template> no, <template>\ny\nz\n</template>", "y\nz"),
        ("```text\na\nb\n```", "a\nb"),
        ("a `b` c", "a `b` c"),
    ],
)
def test_the_template_in_an_answer(answer: str, template: str) -> None:
    assert template_in(answer) == template


async def test_an_edit_that_loses_a_placeholder_is_refused_and_asked_for_again(tmp_path: Path) -> None:
    def forgetful(body: dict[str, Any]) -> str | int:
        if kind_of(body) == "edit" and len(body["messages"]) == 1:
            return "Do it well"
        if kind_of(body) == "edit":
            assert "{task}" in body["messages"][-1]["content"], "it is told what is missing"
            return "Do {task} with red"
        return "go on"

    with ScriptedModel(forgetful) as model:
        apo = lr.APO[str](model.client(), beam_rounds=1, **SMALL)
        await search(tmp_path / "again", apo, TRAIN, ["red"])
        assert apo.get_best_prompt().template == "Do {task} with red"
        assert [c.version for c in state_of(apo).candidates.values()] == ["v0", "v1"], "the same edit is one candidate"
        apo = lr.APO[str](model.client(), beam_rounds=1, edit_attempts=1, **SMALL)
        await search(tmp_path / "never", apo, TRAIN, VAL)
        assert list(state_of(apo).candidates) == ["v0"] and state_of(apo).round == 1


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (500, InfrastructureError, "could not be asked .500."),
        (401, lr.ConfigError, "refused model 'gpt-5-mini' .401..*gradient_model"),
        (404, lr.ConfigError, "refused model 'gpt-5-mini' .404."),
    ],
)
async def test_a_model_that_does_not_answer_ends_the_run_by_name(
    status: int, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with ScriptedModel(lambda body: status) as model:
        apo = lr.APO[str](model.client(), **SMALL)
        with pytest.raises(error, match=words):
            await search(tmp_path, apo, TRAIN, VAL)
    assert apo.get_best_prompt() == SEED["prompt_template"]


async def test_some_calls_may_fail(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: 500 if len(model.bodies) % 3 == 1 else wishes(body)) as model:
        apo = lr.APO[str](model.client(), beam_rounds=4, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL)
    assert state_of(apo).best_score > 0.5


async def test_at_the_cap_of_the_spend_the_search_ends_with_the_best_so_far(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: 402 if len(model.bodies) > 12 else wishes(body)) as model:
        apo = lr.APO[str](model.client(), beam_rounds=9, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL)
    state = state_of(apo)
    assert "may cost no more" in state.stopped and "scripted 402" in state.stopped
    assert 0 < state.round < 9 and state.best_score > 0.0 and state.best != "v0"
    assert len(model.bodies) <= 12 + SMALL["beam_width"] * SMALL["branch_factor"], "nothing is asked after the refusal"


async def test_files_of_ones_own_are_asked(tmp_path: Path) -> None:
    critique, edit = tmp_path / "c.txt", tmp_path / "e.txt"
    critique.write_text("Judge {{ template }} by {% for run in runs %}[{{ run.reward }}]{% endfor %}")
    edit.write_text("Mend {{ template }} by {{ critique }}, keep {{ placeholders[0] }}")
    with ScriptedModel(lambda body: "Do {task} red") as model:
        apo = lr.APO[str](
            model.client(),
            beam_rounds=1,
            gradient_prompt_files=[critique],
            apply_edit_prompt_files=[edit],
            **SMALL,
        )
        await search(tmp_path / "run", apo, ["red", "red"], VAL)
    questions = {body["messages"][0]["content"] for body in model.bodies}
    assert questions == {"Judge Do {task} by [0][0]", "Mend Do {task} by Do {task} red, keep {task}"}


# Pareto


def candidate(version: str, rewards: dict[int, float], *parents: str) -> Candidate:
    return Candidate(version=version, templates={}, rewards=rewards, parents=parents)


def test_the_front_keeps_what_is_best_somewhere() -> None:
    a, b = candidate("v1", {0: 1.0, 1: 0.0, 2: 0.5}), candidate("v2", {0: 0.0, 1: 1.0, 2: 0.5})
    worse, same = candidate("v3", {0: 0.5, 1: 0.0, 2: 0.5}), candidate("v4", {0: 1.0, 1: 0.0, 2: 0.5})
    assert pareto_front([a, b, worse, same]) == [a, b]
    assert wins([a, b]) == {"v1": 2, "v2": 2} and wins([a, worse])["v3"] == 2
    part_of = candidate("v5", {0: 1.0})
    assert pareto_front([a, part_of]) == [a, part_of], "what it was not played on does not count against it"


def test_lines_of_descent() -> None:
    pool = {
        each.version: each
        for each in (
            candidate("v0", {}),
            candidate("v1", {}, "v0"),
            candidate("v2", {}, "v1"),
            candidate("v3", {}, "v1"),
            candidate("v4", {}, "v2", "v3"),
        )
    }
    assert ancestors(pool, "v4") == set(pool) and common_ancestor(pool, "v2", "v3") == "v1"
    assert common_ancestor(pool, "v1", "v3") is None


def test_a_merge_takes_the_version_of_the_line_that_changed_it() -> None:
    def texts(**values: str) -> dict[str, lr.PromptTemplate]:
        return {name: lr.PromptTemplate(template=text) for name, text in values.items()}

    origin, first, second = texts(a="o", b="o", c="o"), texts(a="1", b="o", c="1"), texts(a="o", b="2", c="2")
    assert [changed_by_one(first, second, origin, name) for name in "abc"] == [first["a"], second["b"], None]


async def test_a_pareto_search_validates_only_what_beats_its_parent_and_merges_lines(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=6, selection="pareto", seed=1, **SMALL)
        await search(tmp_path, apo, ["red", "blue", "green", "red"], ["red", "blue", "green"])
    state = state_of(apo)
    assert state.best_score == 1.0 and set(apo.get_best_prompt().template.split()) >= {"red", "blue", "green"}
    edits = [each for each in state.candidates.values() if each.origin == "edit"]
    assert edits and all(each.trial is not None for each in edits)
    assert all(bool(each.rewards) == (each.trial[1] > each.trial[0]) for each in edits)
    merges = [each for each in state.candidates.values() if each.origin == "merge"]
    assert merges and model.asked("merge")
    for merge in merges:
        one, other = merge.parents
        assert common_ancestor(state.candidates, one, other) is not None and merge.trial is None
    assert all(each in state.candidates for each in state.beam)


# What is refused


def refused(apo: lr.APO[Any], tmp_path: Path, train: Any = ("t",), val: Any = ("v",), **trainer: Any) -> str:
    """What fit() says before anything is started."""
    with pytest.raises(lr.ConfigError) as error:
        lr.Trainer(algorithm=apo, runs_dir=tmp_path, **{"initial_resources": SEED, **trainer}).fit(
            wisher, train, val_dataset=val
        )
    assert not list(tmp_path.glob("run*"))
    return str(error.value)


def test_what_cannot_work_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    upstream = lr.Upstream(base_url="http://127.0.0.1:1/v1")
    claude = lr.Upstream(base_url="http://127.0.0.1:1", kind="anthropic")
    client: Any = object()
    assert "hold no PromptTemplate" in refused(lr.APO(client), tmp_path, initial_resources=None)
    only_llm = {"main_llm": lr.LLM(endpoint="http://x/v1", model="m")}
    assert "'main_llm': 'LLM'" in refused(lr.APO(client), tmp_path, initial_resources=only_llm)
    assert "val_dataset has no task" in refused(lr.APO(client), tmp_path, val=None)
    assert "train_dataset has no task" in refused(lr.APO(client), tmp_path, train=[])
    assert "needs a model that criticises" in refused(lr.APO(), tmp_path)
    assert "one only" in refused(lr.APO(client, optimizer="o"), tmp_path, relays={"o": upstream})
    assert "'o' is none of the Trainer's relays: ['p']" in refused(
        lr.APO(optimizer="o"), tmp_path, relays={"p": upstream}
    )
    assert "kind 'anthropic'" in refused(lr.APO(optimizer="o"), tmp_path, relays={"o": claude})
    broken = {"p": lr.PromptTemplate(template="{a} {")}
    assert "initial_resources['p']" in refused(lr.APO(client), tmp_path, initial_resources=broken)
    assert "cannot be read" in refused(lr.APO(client, gradient_prompt_files=[tmp_path / "none.txt"]), tmp_path)
    (tmp_path / "asks.txt").write_text("{{ template }} {{ weather }}")
    apo = lr.APO(client, apply_edit_prompt_files=[tmp_path / "asks.txt"])
    assert "uses weather, which there is not; there are critique, engine" in refused(apo, tmp_path)


@pytest.mark.parametrize(
    "name", ["beam_width", "branch_factor", "beam_rounds", "gradient_batch_size", "val_batch_size", "edit_attempts"]
)
def test_sizes_are_at_least_one(name: str) -> None:
    with pytest.raises(lr.ConfigError, match=f"algorithm.{name}=0: .*greater than or equal to 1"):
        lr.APO(object(), **{name: 0})


def test_names_are_those_of_0_3() -> None:
    client: Any = object()
    apo = lr.APO[dict[str, Any]](client, _poml_trace=True)
    assert apo.async_openai_client is client
    assert lr.APO(openai_client=client).async_openai_client is client
    assert lr.APO(async_openai_client=client) == lr.APO(client)
    theirs = {
        "gradient_model": "gpt-5-mini",
        "apply_edit_model": "gpt-4.1-mini",
        "diversity_temperature": 1.0,
        "gradient_batch_size": 4,
        "val_batch_size": 16,
        "beam_width": 4,
        "branch_factor": 4,
        "beam_rounds": 3,
        "rollout_batch_timeout": 3600.0,
        "run_initial_validation": True,
    }
    assert theirs.items() <= apo.settings().items()
    assert "async_openai_client" not in apo.settings()
    with pytest.raises(NotAttachedError, match="no best prompt yet"):
        apo.get_best_prompt()


async def test_overridden_settings_leave_the_result_with_the_users_own_algorithm(tmp_path: Path) -> None:
    from lightning_ray.launch import Launch, launched

    with ScriptedModel(wishes) as model:
        mine = lr.APO[str](model.client(), **SMALL)
        with launched(Launch(settings={"algorithm.beam_rounds": 2})):
            trainer = lr.Trainer(algorithm=mine, initial_resources=SEED)
        ran: Any = trainer.algorithm
        assert ran is not mine and (ran.beam_rounds, ran.beam_width) == (2, 2)
        await search(tmp_path, ran, TRAIN, VAL)
    assert mine.get_best_prompt() == ran.get_best_prompt() != SEED["prompt_template"]


async def test_without_a_run_the_same_is_refused() -> None:
    with pytest.raises(lr.ConfigError, match="no task"):
        await lr.APO[str](object()).run(["a"], [])
    with pytest.raises(lr.ConfigError, match="needs a model that criticises"):
        await lr.APO[str]().run(["a"], ["b"])
    with pytest.raises(lr.ConfigError, match="'o' is none of the Trainer's relays: there are none"):
        await lr.APO[str](optimizer="o").run(["a"], ["b"])


async def test_tasks_and_long_talk_may_be_kept_from_critiques(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: "x" * 5000 if kind_of(body) == "other" else wishes(body)) as model:

        @lr.rollout
        def asker(task: str, prompt_template: lr.PromptTemplate) -> float:
            client = OpenAI(base_url=model.url, api_key="none", max_retries=0)
            client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "hello"}])
            return 0.5

        apo = lr.APO[str](model.client(), beam_rounds=1, show_tasks=False, max_run_characters=200, **SMALL)
        await search(tmp_path, apo, ["gold"], ["gold"], asker)
    question = model.asked("critique")[0]
    assert "gold" not in question and "user: hello" in question
    assert "x" * 100 in question and "x" * 101 not in question and "characters left out" in question
