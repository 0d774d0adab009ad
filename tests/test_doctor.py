"""The doctor: every rollout has one verdict, the account's own, and odd ones are explained."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.cli import main
from lightning_ray.emit import reward_attributes
from lightning_ray.semconv import AGL_ANNOTATION, AGL_EXCEPTION
from lightning_ray.store import SpanStore, open_folder
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.store.shard_folder import ShardLayout, shard_folder, write_layout
from lightning_ray.store.shard_merge import shard_of
from lightning_ray.trajectories.account import settle
from lightning_ray.trajectories.advice import ADVICE
from lightning_ray.trajectories.doctor import TRAINED, Facts, Report, examine
from lightning_ray.trajectories.episode import last_attempts, read_episodes
from lightning_ray.trajectories.evidence import evidence_of
from lightning_ray.trajectories.join import join_calls
from lightning_ray.trajectories.prefix import Break, find_breaks
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.types import EnqueueRolloutRequest, RolloutConfig
from tests.test_trajectories import call, model_call, span


class Bench:
    """A run's store that is written by hand."""

    def __init__(self, folder: Path):
        self.now = 0.0
        self.folder = folder
        self.store = SpanStore(folder, clock=lambda: self.now, fsync="none")

    def enqueue(self, rollout_id: str, metadata: dict[str, Any] | None = None, mode: Any = "train") -> None:
        self.now += 1
        request = EnqueueRolloutRequest(
            input={}, rollout_id=rollout_id, mode=mode, metadata=metadata, config=RolloutConfig()
        )
        self.store.enqueue_many_rollouts([request])

    def play(
        self,
        rollout_id: str,
        *spans: dict[str, Any],
        reward: float | None = None,
        status: str = "succeeded",
        times: int = 1,
        **metadata: Any,
    ) -> None:
        for _ in range(times):
            self.now += 1
            [lease] = self.store.dequeue_many_rollouts(1, "w", f"rq-{self.now}")
            attempt = lease.attempt.attempt_id
            assert lease.rollout_id == rollout_id
            rows = [{**row, "rollout_id": rollout_id, "attempt_id": attempt} for row in spans]
            if reward is not None:
                rows.append(span(rollout_id, attempt, attributes=reward_attributes(reward)))
            batch = spans_to_batch(rows) if rows else None
            self.store.finish_many_attempts([(rollout_id, attempt, status, metadata or None)], batch)

    def rollout(self, rollout_id: str, *spans: Any, group: str | None = "g", step: int = 0, **ending: Any) -> None:
        metadata = None if group is None else {"group_id": group, "weight_version": step}
        self.enqueue(rollout_id, metadata)
        self.play(rollout_id, *spans, **ending)

    def examine(self, facts: Facts | None = None, **chosen: Any) -> Report:
        self.store.close()
        return examine(open_folder(self.folder), facts or Facts(), **chosen)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run" / "store")


def good(sampled: Sequence[int] = (3,)) -> dict[str, Any]:
    return model_call("", [1, 2], list(sampled))


def reasons(report: Report) -> dict[str, str]:
    return {each.rollout_id: each.reason for each in report.diagnoses}


def failing(kind: str) -> dict[str, Any]:
    """How to end a rollout so that the store calls its failure ``kind``."""
    if kind == "infrastructure":
        return {"status": "failed", "infrastructure": True, "reason": "RayActorError: gone", "times": 6}
    return {"status": kind, "reason": "ValueError: no such table"}


def test_every_reason_is_found(bench: Bench) -> None:
    bench.rollout("good-0", good(), reward=0.0)
    bench.rollout("good-1", good(), reward=1.0)
    bench.rollout("silent", reward=1.0)
    bench.rollout("elsewhere", span("", name="openai.chat.completion", status="OK"), reward=1.0)
    refused = {"status_code": "ERROR", "description": "APIConnectionError: refused"}
    bench.rollout("refused", span("", name="openai.chat.completion", status=refused), reward=1.0)
    bench.rollout("aborted", good() | {"status": "ERROR", "finish_reason": "abort"}, reward=1.0)
    bench.rollout("empty", good([]), reward=1.0)
    bench.rollout("unrewarded", good())
    bench.rollout("buggy", good(), **failing("failed"))
    bench.rollout("slow", good(), **failing("timeout"))
    bench.rollout("mute", good(), **failing("unresponsive"))
    bench.rollout("unlucky", **failing("infrastructure"))
    bench.rollout("alike-0", good(), reward=0.5, group="h")
    bench.rollout("alike-1", good(), reward=0.5, group="h")
    bench.rollout("alone", good(), reward=0.5, group="i")
    bench.rollout("free", good(), reward=0.5, group=None)
    bench.enqueue("cancelled", {"group_id": "g", "weight_version": 0})
    bench.store.update_rollout("cancelled", {"status": "cancelled"})
    bench.enqueue("judged", {"evaluation": "greedy"}, mode="val")
    bench.play("judged", **failing("failed"))
    bench.enqueue("waiting", {"group_id": "j", "weight_version": 0})
    report = bench.examine()
    assert reasons(report) == {
        "good-0": TRAINED,
        "good-1": TRAINED,
        "silent": "no_model_call",
        "elsewhere": "no_token_ids",
        "refused": "calls_failed",
        "aborted": "calls_broken_off",
        "empty": "no_sampled_token",
        "unrewarded": "no_reward",
        "buggy": "agent_failed",
        "slow": "timed_out",
        "mute": "unresponsive",
        "unlucky": "infrastructure_failure",
        "alike-0": "no_variance",
        "alike-1": "no_variance",
        "alone": "group_of_one",
        "free": "usable",
        "cancelled": "cancelled",
        "judged": "evaluation",
        "waiting": "at_work",
    }
    details = {each.rollout_id: each.detail for each in report.diagnoses}
    assert details["buggy"] == "ValueError: no such table" and details["unlucky"] == "RayActorError: gone"
    assert details["refused"] == "1 calls, the last: APIConnectionError: refused"
    assert details["alike-0"] == "reward 0.5" and details["waiting"] == "queuing"
    assert details["judged"] == "agent_failed: ValueError: no such table"
    assert sum(report.counts().values()) == len(report.diagnoses) and next(iter(report.counts())) == TRAINED
    assert set(report.counts()) - {TRAINED} <= set(ADVICE)
    assert next(each for each in report.diagnoses if each.rollout_id == "elsewhere").account_reason == "no_model_call"


def test_a_failure_without_a_reason_is_told_by_its_exception(bench: Bench) -> None:
    told = {"exception.type": "KeyError", "exception.message": "'x'"}
    bench.rollout("x", span("", name=AGL_EXCEPTION, attributes=told), status="failed")
    [diagnosis] = bench.examine().diagnoses
    assert (diagnosis.reason, diagnosis.detail) == ("agent_failed", "KeyError: 'x'")


def test_long_and_stale_trajectories_are_left_out_as_the_settings_say(bench: Bench) -> None:
    for name, sampled in (("a", 1), ("b", 1), ("c", 5)):
        bench.rollout(name, good([3] * sampled), reward=float(name == "a"), step=4)
    steps = [
        {"step": 0, "rollouts": 0, "rollouts_trained": 0, "weight_version": 4},
        {"step": 1, "rollouts": 3, "rollouts_trained": 2, "dropped.too_long": 1, "weight_version": 5},
    ]
    report = bench.examine(Facts(steps, BatchSettings(max_tokens=6)))
    assert reasons(report) == {"a": TRAINED, "b": TRAINED, "c": "too_long"} and not report.contradictions
    stale = examine(open_folder(bench.folder), Facts(steps, max_staleness=1))
    assert set(reasons(stale).values()) == {"too_stale"}
    assert stale.contradictions == [
        "step 1: too_long 0 here, 1 in metrics.jsonl",
        "step 1: too_stale 3 here, 0 in metrics.jsonl",
        "step 1: trained 0 here, 2 in metrics.jsonl",
    ]


def line(step: int, version: int, rollouts: int = 2) -> dict[str, Any]:
    return {"step": step, "rollouts": rollouts, "rollouts_trained": rollouts, "weight_version": version}


@pytest.mark.parametrize("recorded", [True, False], ids=["step", "weight_version"])
def test_a_step_that_was_played_anew_counts_once(bench: Bench, recorded: bool) -> None:
    def play(name: str, step: int) -> None:
        metadata = {"group_id": name, "weight_version": step, **({"step": step} if recorded else {})}
        for index in range(2):
            bench.enqueue(f"{name}-{index}", metadata)
            bench.play(f"{name}-{index}", good(), reward=float(index))

    play("first", 0)
    play("lost", 1)
    play("again", 1)
    play("open", 2)
    report = bench.examine(Facts([line(0, 1), line(1, 2)]))
    steps = {each.rollout_id[:-2]: (each.reason, each.step) for each in report.diagnoses}
    assert steps == {
        "first": (TRAINED, 0),
        "lost": ("not_settled", None),
        "again": (TRAINED, 1),
        "open": ("not_settled", None),
    }
    assert not report.contradictions
    view = open_folder(bench.folder)
    facts = Facts([line(0, 1), line(1, 2)])
    assert [d.rollout_id for d in examine(view, facts, step=1).diagnoses] == ["again-0", "again-1"]
    assert [d.reason for d in examine(view, facts, rollout_id="again-1").diagnoses] == [TRAINED]
    assert not examine(view, facts, rollout_id="nobody").diagnoses


def test_a_step_that_names_its_groups_is_known_by_them(bench: Bench) -> None:
    """Groups that were queued under one version may be trained in several steps, and in any order."""
    for group in ("late", "early", "other"):
        for index in range(2):
            bench.rollout(f"{group}-{index}", good(), reward=float(index), group=group, step=0)
    lines = [line(0, 1) | {"groups": ["early"]}, line(1, 2, 4) | {"groups": ["late", "other"]}]
    report = bench.examine(Facts(lines))
    steps = {each.rollout_id[:-2]: (each.reason, each.step) for each in report.diagnoses}
    assert steps == {"early": (TRAINED, 0), "late": (TRAINED, 1), "other": (TRAINED, 1)}
    assert not report.contradictions


def test_a_run_that_stopped_in_its_first_step_is_explained(bench: Bench) -> None:
    """All rollouts failed: no step was settled, and still each says why."""
    for number in range(3):
        bench.rollout(f"ro-{number}", good(), **failing("failed"))
    bench.rollout("fine", good(), reward=1.0)
    report = bench.examine(Facts([]))
    assert report.counts() == {"agent_failed": 3, "not_settled": 1}


def test_steps_without_an_update_share_a_version(bench: Bench) -> None:
    for step in range(2):
        for index in range(2):
            bench.rollout(f"{step}-{index}", good(), reward=0.0, group=f"g{step}", step=0)
    lines = [line(step, 0) | {"rollouts_trained": 0, "dropped.no_variance": 2} for step in range(2)]
    report = bench.examine(Facts(lines))
    assert [(each.rollout_id, each.step) for each in report.diagnoses] == [
        ("0-0", 0),
        ("0-1", 0),
        ("1-0", 1),
        ("1-1", 1),
    ]
    assert not report.contradictions


def test_the_doctor_agrees_with_the_account(bench: Bench) -> None:
    """Whatever happens to rollouts: the verdicts are what ``settle`` says of them."""
    rng, group_of = random.Random(7), {}
    for number in range(120):
        name, group = f"ro-{number}", f"g{number // 8}"
        group_of[name] = group
        spans = [good([3] * rng.choice([0, 1, 2]))] * rng.choice([0, 1, 1, 1])
        ending: dict[str, Any] = {"reward": rng.choice([None, 0.0, 0.0, 1.0])}
        if rng.random() < 0.2:
            ending |= failing(rng.choice(["failed", "timeout", "unresponsive"]))
        bench.rollout(name, *spans, group=group, **ending)
    report = bench.examine()
    view = open_folder(bench.folder)
    rollouts = list(view.query_rollouts())
    attempts = last_attempts([attempt for name in group_of for attempt in view.query_attempts(name)])
    account = settle(read_episodes(rollouts, view.scan_spans(list(group_of)), attempts), group_of)
    verdicts = {**account.dropped, **{episode.rollout_id: TRAINED for episode in account.trained}}
    assert {each.rollout_id: each.account_reason for each in report.diagnoses} == verdicts
    assert len(report.diagnoses) == len(group_of) and len(Counter(verdicts.values())) > 5


def test_a_store_of_several_shards_is_one_run(tmp_path: Path) -> None:
    benches = [Bench(shard_folder(tmp_path, shard)) for shard in range(2)]
    write_layout(tmp_path, ShardLayout(2, ["here", "here"]))
    names = [f"ro-{number}" for number in range(8)]
    for number, name in enumerate(names):
        benches[shard_of(name, 2)].rollout(name, good(), reward=float(number % 2))
    for bench in benches:
        bench.store.close()
    report = examine(open_folder(tmp_path), Facts())
    assert {each.rollout_id for each in report.diagnoses} == set(names) and report.counts() == {TRAINED: 8}


# Remarks


def test_remarks_leave_nobody_out(bench: Bench) -> None:
    cut = good([3, 4]) | {"finish_reason": "length"}
    bench.rollout("a", cut, model_call("", [1, 2, 3, 9, 8], [5]), model_call("", [7, 7], [5]), reward=0.0)
    bench.rollout("b", good() | {"status": "ERROR"}, good(), reward=1.0)
    report = bench.examine()
    a, b = report.diagnoses
    assert (a.reason, b.reason) == (TRAINED, TRAINED)
    assert [(remark.kind, remark.text) for remark in a.remarks] == [
        ("truncated", "call 1 of 3 was cut; tokens: 2"),
        ("prefix_broken", "at turn 2 of 3, after 3 of 4 ids, in a sampled id: had [4], got [9, 8]"),
        ("new_conversation", "begun by call 3 of 3"),
    ]
    assert [remark.kind for remark in b.remarks] == ["some_calls_broken_off"]
    assert set(report.remarks()) <= set(ADVICE)


def test_attempts_that_were_given_up_are_told(bench: Bench) -> None:
    bench.enqueue("x", {"group_id": "g", "weight_version": 0})
    bench.play("x", good(), status="failed", infrastructure=True, reason="SIGKILL: out of memory")
    bench.play("x", reward=1.0)
    [diagnosis] = bench.examine().diagnoses
    assert diagnosis.reason == "no_model_call"
    assert [(each.kind, each.text) for each in diagnosis.remarks] == [
        ("retried", "attempt 1: failed, SIGKILL: out of memory")
    ]


def test_breaks_are_where_trajectories_begin() -> None:
    calls = [call([1, 2], [3, 4]), call([1, 2, 3, 4, 6], [5]), call([1, 2, 3, 4, 7], [8]), call([1, 9], [1])]
    breaks = find_breaks(calls)
    assert breaks == [
        Break(3, 4, 6, "context", (6, 5), (7,)),
        Break(4, 1, 6, "first_prompt", (2, 3, 4, 6, 5), (9,)),
    ]
    assert len(breaks) + 1 == len(join_calls(calls))
    assert find_breaks([]) == [] and find_breaks(calls[:2]) == []
    [shorter] = find_breaks([call([1, 2], [3, 4]), call([1, 2, 3], [9])])
    assert (shorter.common, shorter.place, shorter.expected, shorter.found) == (3, "sampled", (4,), ())


def test_there_is_no_evidence_without_spans() -> None:
    import pyarrow as pa

    assert evidence_of(pa.Table.from_batches([spans_to_batch([span("x", name=AGL_ANNOTATION)])]), {}) == {}


# The command


@pytest.fixture
def run(bench: Bench) -> Path:
    bench.rollout("a", good(), model_call("", [1, 2, 4], [5]), reward=0.0)
    bench.rollout("b", good(), reward=1.0)
    bench.rollout("c", reward=1.0)
    bench.rollout("d", **failing("failed"))
    bench.store.close()
    folder = bench.folder.parent
    (folder / "config.json").write_text(json.dumps({"algorithm": {"max_tokens": None}}))
    told = {"kind": "train", **line(0, 1, 4), "rollouts_trained": 2, "dropped.no_model_call": 1}
    (folder / "metrics.jsonl").write_text(json.dumps({**told, "dropped.agent_failed": 1}) + "\n")
    return folder


def test_the_report_is_a_table_and_a_paragraph_for_each_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run)]) == 0
    told = capsys.readouterr().out
    for part in ("4 rollouts", "trained", "50.0%", "no_model_call", "base_url=llm.endpoint", "prefix_broken"):
        assert part in told
    assert "1 x ValueError: no such table" in told and "had [3], got [4]" in told
    assert "counted otherwise" not in told
    assert main(["doctor", str(run / "store"), "--step", "0"]) == 0


def test_one_rollout_is_told_in_full(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run), "--rollout", "a"]) == 0
    told = capsys.readouterr().out
    assert "a: trained" in told and "prefix_broken: at turn 2 of 2" in told and "group_id: g" in told


def test_the_answer_for_programs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rollouts"] == 4 == sum(entry["rollouts"] for entry in told["reasons"].values())
    assert told["reasons"]["agent_failed"] == {"rollouts": 1, "share": 0.25, "example": "d"}
    assert [each["rollout_id"] for each in told["diagnoses"]] == ["a", "b", "c", "d"]
    assert told["diagnoses"][0]["breaks"][0]["found"] == [4] and told["contradictions"] == []


def test_the_text_is_told_when_the_tokenizer_is_at_hand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(10)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(run / "model")
    assert main(["doctor", str(run)]) == 0
    told = capsys.readouterr().out
    assert "had: 'w3'" in told and "got: 'w4'" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--rollout", "nobody"], "has no such rollout"),
        (["RUN", "--step", "9"], "settled steps are 0 to 0"),
        (["nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *[str(run) if each == "RUN" else each for each in arguments]]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1


def test_an_empty_run_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SpanStore(tmp_path / "store", fsync="none").close()
    assert main(["doctor", str(tmp_path)]) == 0 and "no rollout yet" in capsys.readouterr().out


def test_each_step_tells_its_groups_and_what_they_lost(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """As steps.jsonl has them: rollouts queued under one version, settled in two steps."""
    for group, rewards in {"alike": (1.0, 1.0), "late": (0.0, 1.0), "early": (0.0, 1.0), "half": (1.0, None)}.items():
        for index, reward in enumerate(rewards):
            bench.rollout(f"{group}-{index}", good(), reward=reward, group=group, step=3)
    bench.store.close()
    run = bench.folder.parent
    (run / "config.json").write_text(json.dumps({"algorithm": {"max_staleness": 9}}))
    settled = [(0, 3, ["early"], {}), (1, 4, ["half", "late", "alike"], {"group_of_one": 1, "no_reward": 1})]
    metrics = [
        {"kind": "train", **line(step, version + 1, 2 * len(groups)), "rollouts_trained": 2}
        | {f"dropped.{reason}": count for reason, count in ({**drops, "no_variance": 2} if drops else {}).items()}
        for step, version, groups, drops in settled
    ]
    steps = [
        {"step": step, "version": version, "groups": [(name, [f"{name}-0", f"{name}-1"]) for name in groups]}
        for step, version, groups, _ in settled
    ]
    for name, lines in (("metrics.jsonl", metrics), ("steps.jsonl", steps)):
        (run / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert main(["doctor", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["contradictions"] == []
    early, other = told["steps"]
    assert early == {"step": 0, "version": 3, "groups": {"early": {TRAINED: 2}}}
    assert list(other["groups"]) == ["half", "late", "alike"], "in the order of the run"
    assert other["groups"]["half"] == {"group_of_one": 1, "no_reward": 1}
    assert main(["doctor", str(run)]) == 0
    told = capsys.readouterr().out
    assert "1 of 2 steps left rollouts out" in told and "no_variance 2, group_of_one 1, no_reward 1" in told
    assert "1 of 3" in told
    assert main(["doctor", str(run), "--step", "1"]) == 0
    assert "groups of step 1, which trained version 4" in capsys.readouterr().out


def test_the_bound_of_a_step_is_of_the_version_that_it_trained(bench: Bench) -> None:
    for index in range(2):
        bench.rollout(f"a-{index}", good(), reward=float(index), group="a", step=0)
    lines = [line(0, 6) | {"groups": ["a"], "version": 5, "rollouts_trained": 0, "dropped.too_stale": 2}]
    report = bench.examine(Facts(lines, max_staleness=2))
    assert set(reasons(report).values()) == {"too_stale"} and not report.contradictions
