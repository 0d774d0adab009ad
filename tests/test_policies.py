"""Several policies: how they are declared, whose calls and rewards are whose, and what is told of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.algorithms.flow import Group
from lightning_ray.algorithms.loop import TrainingLoop, all_of
from lightning_ray.algorithms.policies import shared_name
from lightning_ray.capture.audience import audience_of
from lightning_ray.commands.doctor import read_facts
from lightning_ray.config import EngineSettings
from lightning_ray.emit import reward_attributes
from lightning_ray.errors import ConfigError, TrainersLostError
from lightning_ray.launch import Launch
from lightning_ray.machine import check_memory
from lightning_ray.replay.batch import rebuild
from lightning_ray.replay.record import chain
from lightning_ray.replay.settings import recorded, settings_of
from lightning_ray.run.folder import RunFolder, settings_in
from lightning_ray.run.policy_folder import folder_of
from lightning_ray.run.policy_rows import by_policy, policies_in, rows_of
from lightning_ray.run.state import PolicyState, RunState
from lightning_ray.run.step_figures import StepTimes
from lightning_ray.run.summary import summarize
from lightning_ray.stopping import Stop
from lightning_ray.store import open_folder
from lightning_ray.trajectories.account import Account, settle
from lightning_ray.trajectories.doctor import examine
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.trajectories.usable import outcome_of
from tests.test_doctor import Bench
from tests.test_selection import ROLLOUT, call, table
from tests.test_step_figures import episode
from tests.test_trajectories import model_call, span


def make(folder: Path) -> None: ...


def two(**writer: Any) -> lr.GRPO:
    return lr.GRPO(
        learning_rate=1e-3,
        clip_high=0.3,
        engine=lr.EngineSettings(max_model_len=99),
        policies={
            "writer": lr.Policy(**{"model": make, "agents": "write|rewrite", **writer}),
            "judge": lr.Policy(endpoint="https://example.com/v1", trainable=False),
        },
    )


# Declaring


def test_a_policy_has_the_runs_settings_but_for_its_own_part_by_part() -> None:
    writer = two(advantage="rloo", ranks=1, max_staleness=2, engine=lr.EngineSettings(replicas=2)).of("writer")
    assert (writer.advantage, writer.ranks, writer.max_staleness, writer.learning_rate) == ("rloo", 1, 2, 1e-3)
    assert (writer.engine.replicas, writer.engine.max_model_len) == (2, 99)
    assert writer.model is make and writer.model_name == "writer" and writer.policies is None


def test_a_preset_of_its_own_takes_the_place_of_what_the_run_decides_of_it() -> None:
    assert two(preset="cispo").of("writer").clip_high == 4.0 and two().of("writer").clip_high == 0.3
    assert two(preset="cispo", clip_high=2.0).of("writer").clip_high == 2.0


def test_lora_is_on_or_off_or_says_more() -> None:
    ranks = [two(lora=lora).of("writer").lora.rank for lora in (True, False, {"rank": 4})]
    assert ranks == [16, 0, 4]


def test_what_is_trained_what_is_served_and_what_is_relayed() -> None:
    settings = lr.GRPO(policies={**(two().policies or {}), "critic": lr.Policy(model="m", trainable=False)})
    assert list(settings.trained()) == ["writer"] and list(settings.frozen()) == ["critic"]
    relays = settings.relays({"other": lr.Upstream(base_url="http://a/v1")})
    assert list(relays) == ["other", "judge"] and relays["judge"].base_url == "https://example.com/v1"
    with pytest.raises(ConfigError, match="judge: relays and policies both have this name"):
        settings.relays(relays)


def test_the_strictest_policy_sets_the_pace() -> None:
    assert two(max_staleness=3).pace() == 3
    settings = lr.GRPO(
        max_staleness=2, policies={"a": lr.Policy(model="m"), "b": lr.Policy(model="m", max_staleness=1)}
    )
    assert settings.pace() == 1 and settings.of("a").max_staleness == 2


M = lr.Policy(model="m")
FROZEN = {"endpoint": "http://x/v1", "trainable": False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policies": {}}, "none of them is trained"),
        ({"policies": {"a": {"model": "m", "trainable": False}}}, "none of a is trained"),
        ({"policies": {"a": lr.Policy(model="m", endpoint="http://x")}}, "model='m' and endpoint='http://x' are both"),
        ({"policies": {"a": lr.Policy(endpoint="http://x")}}, "policies.a.endpoint='http://x': its weights are out of"),
        ({"policies": {"a": M, "b": lr.Policy(trainable=False)}}, "policies.b: there is neither model nor endpoint"),
        ({"policies": {"writer": M, "wirter": {"trainable": False}}}, "did you mean 'writer'"),
        ({"model": "m", "policies": {"a": M}}, "algorithm.model='m' and algorithm.policies are both given"),
        ({"agent_match": "x", "policies": {"a": M}}, "algorithm.agent_match='x' and algorithm.policies are both given"),
        ({"policies": {"a": {"modl": "m"}}}, "algorithm.policies.a.modl='m': there is no such setting; did you mean"),
        ({"policies": {"a": 3}}, "algorithm.policies.a=3: give an lr.Policy"),
        ({"policies": {"a/b": M}}, "policy 'a/b': a name has letters"),
        ({"policies": {"main_llm": M}}, "policy 'main_llm'"),
        ({"policies": {"policy": M}}, "policy 'policy': that is what a run's only policy is called"),
        ({"policies": {"a": lr.Policy(model="m", agents="(")}}, "policies.a.agents='\\(' is no regular expression"),
        ({"policies": {"a": M, "b": FROZEN, "c": FROZEN}}, "policies.c.agents=None have every agent in common"),
        (
            {"policies": {"a": M, "b": FROZEN | {"agents": "x|y"}, "c": FROZEN | {"agents": "y.*"}}},
            "policies.b.agents='x|y' and policies.c.agents='y.*' have 'y' in common, and both have the endpoint",
        ),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|").replace(".*", r"\.\*")):
        lr.GRPO(**given)


def test_settings_that_do_not_fit_together_name_the_policy() -> None:
    with pytest.raises(ConfigError, match=r"policies\.writer: .*loss_horizon"):
        two(loss_aggregation="seq-mean-token-sum-norm").trained()
    with pytest.raises(ConfigError, match="there is no policy 'writter'; did you mean 'writer'"):
        two().of("writter")


def test_names_that_two_patterns_share() -> None:
    assert shared_name("a|b", "c|d") is None and shared_name("a.*", "b.*") is None
    assert shared_name("a", "a|b") == "'a'" and shared_name("a.+", "a.+") == "all of 'a.+'"


def test_the_command_line_reaches_a_policy() -> None:
    launch = Launch(
        settings={"algorithm.policies.judge.trainable": False, "algorithm.policies.writer.learning_rate": 2.0}
    )
    changed = launch.apply(two())
    assert changed.of("writer").learning_rate == 2.0 and changed.of("writer").model is make
    with pytest.raises(ConfigError, match="none of writer, judge is trained"):
        Launch(settings={"algorithm.policies.writer.trainable": False}).apply(two())


def test_the_resolved_settings_are_json_of_each_policy() -> None:
    told = json.loads(json.dumps(two(advantage="rloo").settings(), default=str))["policies"]
    assert (told["writer"]["advantage"], told["writer"]["learning_rate"], told["writer"]["agents"]) == (
        "rloo",
        1e-3,
        "write|rewrite",
    )
    assert told["judge"]["endpoint"]["base_url"] == "https://example.com/v1" and not told["judge"]["trainable"]


def test_each_endpoint_has_keys_of_its_own() -> None:
    found = [
        audience_of(f"http://h:1{path}/v1") for path in ("", "/policies/writer", "/x/policies/a", "/relay/to/writer")
    ]
    assert found == ["policy", "policy:writer", "policy:a", "relay:writer"]


def test_the_memory_of_all_is_counted() -> None:
    engine = EngineSettings()
    check_memory([engine], 1)
    with pytest.raises(ConfigError, match=r"for 2001 replica\(s\) and 3 trainer rank\(s\)"):
        check_memory([engine, EngineSettings(replicas=2000)], 3)
    huge = {"kv_cache_memory_mb": 2**40}
    check_memory([EngineSettings(device="cuda", **huge)], 1)  # a GPU's, not this memory
    with pytest.raises(ConfigError, match="too little memory"):
        check_memory([EngineSettings(**huge)], 1)


# Whose calls, whose reward


def reward(span_id: str, **values: float) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for index, (name, value) in enumerate(values.items()):
        attributes |= {
            f"agentlightning.reward.{index}.name": name,
            f"agentlightning.reward.{index}.value": value,
        }
    row = call(span_id, [], [], name="agentlightning.annotation", attributes=attributes)
    return row | dict.fromkeys(("prompt_ids", "sampled_ids", "logprobs", "weight_versions"))


CALLS = [
    call("a", [1], [2], model="writer", agent="write"),
    call("b", [1, 2], [3], model="checker", agent="check"),
    call("c", [1, 2, 4], [5], model="writer", agent="rewrite"),
    call("d", [9], [9], model="writer", agent="title"),
]
WRITER = r"\A(?:write|rewrite)\Z"


def share(policy: str | None, agents: str | None, *more: dict[str, Any]) -> Episode:
    [found] = read_episodes([ROLLOUT], table(*CALLS, *more), {"ro": "at"}, agents, policy)
    return found


def test_a_call_trains_the_policy_that_answered_it_if_its_agent_is_among_its_agents() -> None:
    writer, checker = share("writer", WRITER), share("checker", None)
    assert [row.token_ids.tolist() for row in writer.trajectories] == [[1, 2, 4, 5]]
    assert writer.trajectories[0].mask.tolist() == [0, 1, 0, 1] and writer.calls == 4
    assert [row.token_ids.tolist() for row in checker.trajectories] == [[1, 2, 3]]
    assert share("judge", None).trajectories == []


def test_a_dimension_with_the_policys_name_or_an_agents_is_its_reward() -> None:
    emitted = [reward("r1", all=1.0, write=0.25), reward("r2", all=2.0, rewrite=0.5, checker=-1.0)]
    writer, checker = share("writer", WRITER, *emitted), share("checker", None, *emitted)
    assert (writer.reward, checker.reward, share(None, None, *emitted).reward) == (0.75, -1.0, 2.0)
    assert writer.outcome == checker.outcome == 2.0
    assert share("judge", None, *emitted).reward == 2.0, "without a dimension of its own it has the rollout's"


def test_weights_that_are_given_go_before_dimensions_of_its_own() -> None:
    found = share("writer", WRITER, reward("r", all=2.0, writer=1.0))
    assert outcome_of(found, BatchSettings()).episode.reward == 1.0
    assert outcome_of(found, BatchSettings(reward_weights={"all": 2.0})).episode.reward == 4.0


# A step


class OnePolicy:
    """Under training; tells what was asked of it."""

    def __init__(self, name: str, rewards: Sequence[float], lost: bool = False) -> None:
        self.name, self.rewards, self.lost = name, rewards, lost
        self.version = 0
        self.done: list[str] = []

    def settle(self, episodes: list[Episode], group_of: dict[str, str]) -> Account:
        return settle(episodes, group_of)

    def check_tokens(self, account: Account) -> None: ...

    async def update(self, batch: Any) -> dict[str, Any]:
        self.done.append(f"update {batch.num_rows}")
        if self.lost:
            raise TrainersLostError("killed")
        return {"trained_tokens": 1.0, "seconds": 1.0}

    async def publish(self, version: int) -> None:
        self.done.append(f"publish {version}")
        self.version = version


class SeveralRun:
    """It is its folder, too."""

    def __init__(self, *policies: OnePolicy) -> None:
        self.policies = {policy.name: policy for policy in policies}
        self.state = RunState()
        self.stop = Stop()
        self.folder = self
        self.lines: list[dict[str, Any]] = []
        self.recorded: list[dict[str, Any]] = []

    async def read_shares(self, rollout_ids: list[str]) -> dict[str, list[Episode]]:
        return {
            name: [episode(one, reward, (3, 2)) for one, reward in zip(rollout_ids, policy.rewards, strict=True)]
            for name, policy in self.policies.items()
        }

    def append_step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def record_step(self, step: int, played: Any, updates: dict[str, Any], times: StepTimes) -> None:
        self.recorded.append(updates)

    async def trace_step(self, step: int, played: Any, times: StepTimes) -> None: ...


class OneGroup:
    async def fill(self, version: int) -> None: ...

    async def take(self, count: int, version: int) -> list[Group]:
        return [Group(0, version, "g", ["a", "b"])]

    def release(self, group_ids: Any) -> None: ...


async def one_step(*policies: OnePolicy) -> SeveralRun:
    run = SeveralRun(*policies)
    named = {policy.name: lr.Policy(model="m") for policy in policies}
    settings = lr.GRPO(policies=named, steps=9, prompts_per_step=1, group_size=2, validate_every=0, checkpoint_every=9)
    loop: Any = TrainingLoop(settings, run)  # type: ignore[arg-type]
    loop._source._flow = OneGroup()
    await loop._step(0)
    return run


async def test_a_policy_that_learns_nothing_in_a_step_stays_at_its_version() -> None:
    writer, checker = OnePolicy("writer", (0.0, 1.0)), OnePolicy("checker", (1.0, 1.0))
    run = await one_step(writer, checker)
    assert writer.done == ["update 2", "publish 1"] and checker.done == []
    assert list(run.recorded[0]) == ["writer"]
    [line] = run.lines
    assert line == {
        "step": 0,
        "versions": {"writer": 0, "checker": 0},
        "groups": [("g", ["a", "b"])],
        "trained": {"writer": 2, "checker": 0},
    }


async def test_nothing_is_published_when_one_of_the_updates_lost_a_rank() -> None:
    writer, checker = OnePolicy("writer", (0.0, 1.0)), OnePolicy("checker", (0.0, 1.0), lost=True)
    with pytest.raises(TrainersLostError):
        await one_step(writer, checker)
    assert (writer.done, checker.done) == (["update 2"], ["update 2"])


async def test_all_come_to_their_end_and_a_lost_rank_is_told_first() -> None:
    ended: list[int] = []

    async def work(error: Exception | None) -> int:
        ended.append(1)
        if error is not None:
            raise error
        return 1

    with pytest.raises(TrainersLostError):
        await all_of([work(ValueError()), work(TrainersLostError()), work(None)])
    assert len(ended) == 3 and await all_of([work(None), work(None)]) == [1, 1]


# What is told of it


ROWS = [
    {"kind": "train", "step": 0, "reward": 0.5}
    | by_policy(
        {
            "a": {"weight_version": 1, "sampled_tokens": 3, "reward": 0.1},
            "b.c": {"weight_version": 0, "sampled_tokens": 4},
        }
    )
]


def test_rows_of_several_policies_are_told_as_those_of_one() -> None:
    assert policies_in(ROWS) == ["a", "b.c"] and policies_in([{"weight_version": 1}]) == []
    assert ROWS[0]["sampled_tokens"] == 7 and ROWS[0]["swap_ms"] is None
    assert by_policy({"a": {"swap_ms": 3.0}, "b": {"swap_ms": None}, "c": {"swap_ms": 4.0}})["swap_ms"] == 4.0
    assert rows_of(ROWS, "a") == [{"kind": "train", "step": 0, "reward": 0.1, "weight_version": 1, "sampled_tokens": 3}]
    assert rows_of(ROWS, "b.c")[0]["reward"] == 0.5 and rows_of(ROWS, None) == ROWS


def test_the_folder_as_one_policy_has_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    line = {"step": 0, "versions": {"a": 4, "b.c": 7}, "groups": [], "trained": {"a": 2, "b.c": 0}}
    RunFolder(tmp_path).append_step(line)
    own = {"trainable": True, "agents": None, "batch": {}}
    known = {"name": "GRPO", "policies": {"judge": {"trainable": False}, "a": own, "b.c": own | {"ranks": 3}}}
    folder, settings = folder_of(tmp_path, "b.c", known)
    assert folder.steps()[0]["version"] == 7 and folder.steps()[0]["trained"] == 0
    assert folder.metrics()[0]["sampled_tokens"] == 4 and settings == {"name": "GRPO", "batch": {}, "ranks": 3}
    assert folder.part(tmp_path / "step-1") == tmp_path / "step-1" / "b.c" and folder.model().name == "b.c"
    assert folder_of(tmp_path, None, known)[0].policy == "a"
    for policy, message in (("judge", "is not trained"), ("aa", "no such policy; did you mean 'a'")):
        with pytest.raises(ConfigError, match=message):
            folder_of(tmp_path, policy, known)
    with pytest.raises(ConfigError, match="has one policy"):
        folder_of(tmp_path, "a", {"name": "GRPO"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one step: the writer learned from its two rollouts; of the checker's calls both had the same reward."""
    folder, bench = tmp_path / "run", Bench(tmp_path / "run" / "store")
    for name, worth in (("a", 0.0), ("b", 1.0)):
        answers = {"writer": [3], "checker": [4]}
        calls = [model_call("", [1, 2], sampled) | {"model": policy} for policy, sampled in answers.items()]
        values = reward_attributes({"all": worth, "checker": 0.5}, "all")
        bench.rollout(name, *calls, span("", attributes=values))
    bench.store.close()
    settings = lr.GRPO(policies={name: lr.Policy(model="m") for name in ("writer", "checker")}).settings()
    (folder / "config.json").write_text(json.dumps({"algorithm": {"name": "GRPO", **settings}}, default=str))
    line = {"step": 0, "versions": {"writer": 0, "checker": 0}, "groups": [("g", ["a", "b"])]}
    RunFolder(folder).append_step(line | {"trained": {"writer": 2, "checker": 0}})
    figures = {
        "writer": {"weight_version": 1, "rollouts_trained": 2, "update.loss": 0.25},
        "checker": {"weight_version": 0, "rollouts_trained": 0, "dropped.no_variance": 2},
    }
    row = {"kind": "train", "step": 0, "rollouts": 2, **by_policy(figures)}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(("policy", "reason"), [(None, "trained"), ("writer", "trained"), ("checker", "no_variance")])
def test_the_doctor_looks_at_one_policy(run: Path, policy: str | None, reason: str) -> None:
    report = examine(open_folder(run / "store"), read_facts(run, policy))
    assert {each.rollout_id: each.reason for each in report.diagnoses} == {"a": reason, "b": reason}
    assert report.contradictions == []


def test_a_step_is_rebuilt_for_the_policy_that_learned_from_it(run: Path) -> None:
    settings = settings_of(recorded(run, "writer"), run)
    folder = folder_of(run, "writer", settings_in(run))[0]
    [record] = chain(folder, 0)[1]
    assert record.figures["loss"] == 0.25 and record.trained == 2
    table = rebuild(open_folder(run / "store"), record, settings.batch, 0, settings.agent_match, folder.policy)
    assert table["token_ids"].to_pylist() == [[1, 2, 3], [1, 2, 3]] and table["reward"].to_pylist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match="--step 0 trained nothing"):
        chain(folder_of(run, "checker", settings_in(run))[0], 0)


def test_a_resume_trains_what_was_trained() -> None:
    state = RunState(policies={"writer": PolicyState(), "checker": PolicyState()})
    state.check_policies(["checker", "writer"])
    with pytest.raises(ConfigError, match="the run trained writer, checker, and is to go on with writer"):
        state.check_policies(["writer"])


def test_the_summary_has_each_policy_and_their_sums() -> None:
    states = {"a": PolicyState(version=3, swaps=4, swap_ms=[1.0, 3.0]), "b": PolicyState(version=1, swaps=2)}
    summary = summarize(
        RunState.of(json.loads(json.dumps({"policies": {k: vars(v) for k, v in states.items()}}))), 1, 1
    )
    assert summary["swaps"] == 6 and summary["policies"]["a"]["version"] == 3
    assert summary["policies"]["a"]["swap_ms_median"] == 2.0 and "policies" not in summarize(RunState(), 0.0, 0)


# Agents


async def test_an_agent_gets_all_models_by_name_under_its_attempts_own_addresses() -> None:
    @lr.rollout
    async def agent(task: Any, llms: dict[str, lr.LLM]) -> Any:
        return llms

    attempt = lr.Attempt(rollout_id="ro", attempt_id="at", sequence_id=1, start_time=0.0, status="running")
    played = lr.AttemptedRollout(rollout_id="ro", input=1, start_time=0.0, status="running", attempt=attempt)
    resources: Any = {
        "writer": lr.ProxyLLM(endpoint="http://h/policies/writer/v1", model="writer"),
        "judge": lr.LLM(endpoint="http://j/v1", model="j"),
        "prompt": lr.PromptTemplate(template="x"),
    }
    found: Any = await agent.rollout_async(1, resources, played)
    assert list(found) == ["writer", "judge"] and found["judge"] is resources["judge"]
    assert found["writer"].endpoint == "http://h/policies/writer/rollout/ro/attempt/at/v1"
