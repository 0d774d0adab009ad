"""The doctor: what became of every rollout of a run, and why some gave no training data.

The verdicts are ``account``'s own, on the groups and steps that the run recorded. Every rollout has exactly one:
trained, or a reason; remarks tell of oddities that leave nobody out. How it looks is left to ``doctor_command``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.semconv import AGL_EXCEPTION, MODEL_CALL_NAMES
from lightning_ray.store.schema import read_spans
from lightning_ray.trajectories.account import settle, unusable
from lightning_ray.trajectories.episode import Episode, calls_of, read_episodes
from lightning_ray.trajectories.join import ModelCall
from lightning_ray.trajectories.prefix import Break, find_breaks
from lightning_ray.trajectories.selection import answered, captured_calls, of_agents
from lightning_ray.types import TERMINAL_ROLLOUT, Attempt, AttemptedRollout, Rollout

CHUNK = 512
"""Rollouts whose spans are held at once, unless a step has more."""
TRAINED = "trained"
FINER = dict.fromkeys(("no_token_ids", "calls_broken_off", "calls_failed"), "no_model_call")
"""Reasons that say more than the account's, which they stand for."""
_CALL_NAMES = pa.array([*MODEL_CALL_NAMES.values()])


class View(Protocol):
    """What of a store's folder is needed."""

    def query_rollouts(self) -> Iterable[Rollout]: ...

    def query_attempts(self, rollout_id: str) -> Iterable[Attempt]: ...

    def scan_spans(self, rollout_ids: Sequence[str]) -> pa.Table: ...


@dataclass(frozen=True)
class Remark:
    """Something odd about a rollout."""

    kind: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What became of one rollout. ``step`` is None for those that no step was settled with."""

    rollout_id: str
    reason: str
    detail: str | None = None
    group_id: str | None = None
    step: int | None = None
    remarks: tuple[Remark, ...] = ()
    breaks: tuple[Break, ...] = field(default=(), repr=False)

    @property
    def account_reason(self) -> str:
        """The reason in the words of the run's account."""
        return FINER.get(self.reason, self.reason)


@dataclass(frozen=True)
class Evidence:
    """What the spans of the attempt that counts tell beyond its episode."""

    calls: Sequence[ModelCall] = ()
    """Those that were answered."""
    finishes: Sequence[str | None] = ()
    """Why each of them ended."""
    broken_off: int = 0
    untold: int = 0
    """Calls seen at the client alone that were answered."""
    failed: Sequence[str] = ()
    """What became of those that were not."""
    exception: str | None = None
    given_up: Sequence[Attempt] = ()
    """The attempts before it."""


@dataclass(frozen=True)
class Facts:
    """What a run's folder tells beside its store. ``steps`` are the training lines of metrics.jsonl, in order; None if
    there is no telling which steps were settled.
    """

    steps: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int | None = None
    max_staleness: int | None = None
    agent_match: str | None = None


@dataclass(frozen=True)
class Report:
    """All diagnoses, in order of the rollouts' creation, and where they contradict the run's own account."""

    diagnoses: list[Diagnosis]
    contradictions: list[str]

    def counts(self) -> dict[str, int]:
        """Rollouts by reason, most first; ``trained`` is the first."""
        counts = Counter(each.reason for each in self.diagnoses)
        return dict(sorted(counts.items(), key=lambda item: (item[0] != TRAINED, -item[1], item[0])))

    def remarks(self) -> dict[str, int]:
        """Rollouts by remark, most first."""
        kinds = Counter(kind for each in self.diagnoses for kind in {remark.kind for remark in each.remarks})
        return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def examine(view: View, facts: Facts, rollout_id: str | None = None, step: int | None = None) -> Report:
    """Diagnose the rollouts of a run, of one step, or one rollout (on which its whole step is looked at)."""
    rollouts = sorted(view.query_rollouts(), key=lambda rollout: rollout.start_time)
    steps = settled_steps(rollouts, facts.steps)
    parts = _parts(rollouts, steps)
    wanted = [
        (number, part)
        for number, part in parts
        if (step is None or number == step)
        and (rollout_id is None or any(rollout.rollout_id == rollout_id for rollout in part))
    ]
    found: dict[str, Diagnosis] = {}
    contradictions = []
    for number, part in wanted:
        diagnoses = _diagnose(view, facts, number, part)
        found.update({each.rollout_id: each for each in diagnoses})
        if number is not None:
            contradictions += contradiction(number, diagnoses, facts.steps or ())
    kept = [rollout.rollout_id for rollout in rollouts if rollout.rollout_id in found]
    chosen = kept if rollout_id is None else [rollout_id] * (rollout_id in found)
    return Report([found[each] for each in chosen], contradictions)


def settled_steps(rollouts: Sequence[Rollout], lines: Sequence[Mapping[str, Any]] | None) -> dict[str, int]:
    """Rollout id -> the step that was settled with it.

    A step is known by the number in its rollouts' metadata, otherwise by the weight version they were queued under.
    One that was played anew after an interruption was settled with the rollouts played last.
    """
    waiting: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for rollout in rollouts:
        metadata = rollout.metadata or {}
        if "group_id" in metadata and rollout.status in TERMINAL_ROLLOUT:
            for key in ("step", "weight_version"):
                if key in metadata:
                    waiting[key, metadata[key]].append(rollout.rollout_id)
                    break
    steps: dict[str, int] = {}
    versions = [0, *(line["weight_version"] for line in lines or ())]
    for line, version in reversed(list(zip(lines or (), versions, strict=False))):
        queue = waiting.get(("step", line["step"])) or waiting.get(("weight_version", version)) or []
        count = line["rollouts"]
        steps.update(dict.fromkeys(queue[-count:], line["step"]))
        del queue[-count:]
    return steps


def _parts(rollouts: Sequence[Rollout], steps: Mapping[str, int]) -> list[tuple[int | None, list[Rollout]]]:
    """The rollouts in portions to look at: whole steps, and of the others whole groups."""
    by_step: defaultdict[int, list[Rollout]] = defaultdict(list)
    groups: defaultdict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        if (number := steps.get(rollout.rollout_id)) is not None:
            by_step[number].append(rollout)
        else:
            groups[_group_of(rollout) or rollout.rollout_id].append(rollout)
    parts: list[tuple[int | None, list[Rollout]]] = [*by_step.items()]
    portion: list[Rollout] = []
    for group in groups.values():
        portion += group
        if len(portion) >= CHUNK:
            parts.append((None, portion))
            portion = []
    return [*parts, (None, portion)] if portion else parts


def _diagnose(view: View, facts: Facts, step: int | None, rollouts: Sequence[Rollout]) -> list[Diagnosis]:
    spans = view.scan_spans([rollout.rollout_id for rollout in rollouts]).combine_chunks()
    last = {r.rollout_id: r.attempt.attempt_id for r in rollouts if isinstance(r, AttemptedRollout)}
    episodes = read_episodes(rollouts, spans, last, facts.agent_match)
    evidence = evidence_of(spans, last, facts.agent_match)
    for rollout in rollouts:
        if isinstance(rollout, AttemptedRollout) and rollout.attempt.sequence_id > 1:
            given_up = [each for each in view.query_attempts(rollout.rollout_id) if each != rollout.attempt]
            known = evidence.get(rollout.rollout_id, Evidence())
            evidence[rollout.rollout_id] = replace(known, given_up=given_up)
    verdicts = _verdicts(episodes, facts, step)
    return [
        _diagnosis(episode, verdicts[episode.rollout_id], evidence.get(episode.rollout_id, Evidence()), step)
        for episode in episodes
    ]


def _verdicts(episodes: Sequence[Episode], facts: Facts, step: int | None) -> dict[str, str]:
    """Rollout id -> ``trained`` or why not, in the account's words."""
    verdicts: dict[str, str] = {}
    groups: defaultdict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        rollout = episode.rollout
        if rollout.mode in ("val", "test"):
            verdicts[episode.rollout_id] = "evaluation"
        elif (group := _group_of(rollout)) is not None:
            groups[group].append(episode)
        elif rollout.status in TERMINAL_ROLLOUT:
            verdicts[episode.rollout_id] = unusable(episode, facts.max_tokens) or "usable"
        else:
            verdicts[episode.rollout_id] = "at_work"
    if step is None:
        for members in list(groups.values()):
            open_ = any(member.rollout.status not in TERMINAL_ROLLOUT for member in members)
            if facts.steps is not None or open_:
                verdicts.update({member.rollout_id: _unsettled(member, facts) for member in members})
                groups.pop(str(_group_of(members[0].rollout)))
    together = [member for members in groups.values() for member in members]
    oldest = None
    if facts.max_staleness is not None and step is not None:
        oldest = max(((e.rollout.metadata or {}).get("weight_version", 0) for e in together), default=0)
        oldest -= facts.max_staleness
    account = settle(together, {e.rollout_id: str(_group_of(e.rollout)) for e in together}, facts.max_tokens, oldest)
    return {**verdicts, **account.dropped, **{e.rollout_id: TRAINED for e in account.trained}}


def _unsettled(episode: Episode, facts: Facts) -> str:
    if episode.rollout.status not in TERMINAL_ROLLOUT:
        return "at_work"
    return unusable(episode, facts.max_tokens) or "not_settled"


def _group_of(rollout: Rollout) -> str | None:
    return (rollout.metadata or {}).get("group_id")


def evidence_of(spans: pa.Table, attempts: Mapping[str, str], agent_match: str | None = None) -> dict[str, Evidence]:
    """The evidence for each rollout with spans, from the attempt that counts, and the agents to train."""
    counted = spans.filter(pc.is_in(spans["attempt_id"], pa.array(list(attempts.values()), pa.string())))
    captured = of_agents(captured_calls(counted), agent_match)
    ended = answered(captured)
    calls = calls_of(ended)
    finishes: defaultdict[str, list[str | None]] = defaultdict(list)
    for rollout_id, reason in zip(ended["rollout_id"].to_pylist(), ended["finish_reason"].to_pylist(), strict=True):
        finishes[rollout_id].append(reason)
    broken_off = Counter(captured["rollout_id"].to_pylist())
    broken_off.subtract(ended["rollout_id"].to_pylist())
    untold, failed = _calls_at_the_client(counted.filter(pc.invert(_is_of(counted, calls))))
    exceptions: dict[str, str] = {}
    for span in read_spans(counted.filter(pc.equal(counted["name"], AGL_EXCEPTION))):
        told = span.attributes.get
        exceptions[span.rollout_id] = f"{told('exception.type')}: {told('exception.message')}"
    return {
        rollout_id: Evidence(
            calls.get(rollout_id, ()),
            finishes.get(rollout_id, ()),
            broken_off[rollout_id],
            untold[rollout_id],
            failed.get(rollout_id, ()),
            exceptions.get(rollout_id),
        )
        for rollout_id in pc.unique(counted["rollout_id"]).to_pylist()
    }


def _calls_at_the_client(spans: pa.Table) -> tuple[Counter[str], dict[str, list[str]]]:
    """Calls that no engine told of, by rollout: how many were answered, and what became of the others."""
    untold: Counter[str] = Counter()
    failed: defaultdict[str, list[str]] = defaultdict(list)
    is_call = pc.and_(pc.is_in(spans["name"], _CALL_NAMES), pc.is_null(spans["prompt_ids"]))
    for span in read_spans(spans.filter(is_call)):
        if span.status.status_code == "ERROR":
            failed[span.rollout_id].append(span.status.description or "no answer")
        else:
            untold[span.rollout_id] += 1
    return untold, failed


def _is_of(spans: pa.Table, rollout_ids: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(spans["rollout_id"], pa.array(list(rollout_ids), pa.string()))


def _diagnosis(episode: Episode, verdict: str, evidence: Evidence, step: int | None) -> Diagnosis:
    rollout = episode.rollout
    reason = verdict
    if verdict == "no_model_call":
        reason = _finer(evidence)
    breaks = find_breaks(evidence.calls) if len(episode.trajectories) > 1 else []
    return Diagnosis(
        rollout.rollout_id,
        reason,
        _detail(episode, reason, evidence),
        _group_of(rollout),
        step,
        tuple(_remarks(episode, evidence, breaks)),
        tuple(breaks),
    )


def _finer(evidence: Evidence) -> str:
    """Why no model call counts."""
    if evidence.broken_off:
        return "calls_broken_off"
    if evidence.untold:
        return "no_token_ids"
    return "calls_failed" if evidence.failed else "no_model_call"


def _detail(episode: Episode, reason: str, evidence: Evidence) -> str | None:
    """What is particular to this rollout."""
    rollout = episode.rollout
    told: str | None = ((rollout.metadata or {}).get("failure") or {}).get("reason")
    if reason == "evaluation":
        problem = unusable(episode)
        return None if problem is None else f"{problem}: {told or evidence.exception or rollout.status}"
    if rollout.status == "failed":
        return told or evidence.exception
    if reason == "at_work":
        return rollout.status
    if reason == "no_variance":
        return f"reward {episode.reward:g}"
    if reason == "calls_broken_off":
        return f"{evidence.broken_off} calls broken off"
    if reason == "no_token_ids":
        return f"{evidence.untold} calls of another model"
    if reason == "calls_failed":
        return f"{len(evidence.failed)} calls, the last: {evidence.failed[-1]}"
    if reason == "too_long":
        return f"{max(len(t.token_ids) for t in episode.trajectories)} tokens"
    if reason in ("no_reward", "reward_not_finite"):
        return f"{episode.calls} model calls, reward {episode.reward}"
    return None


def _remarks(episode: Episode, evidence: Evidence, breaks: Sequence[Break]) -> Iterable[Remark]:
    total = episode.calls
    for turn, (call, finish) in enumerate(zip(evidence.calls, evidence.finishes, strict=True), 1):
        if finish == "length":
            yield Remark("truncated", f"call {turn} of {total} was cut; tokens: {len(call.sampled_ids)}")
    for one in breaks:
        if one.place == "first_prompt":
            yield Remark("new_conversation", f"begun by call {one.turn} of {total}")
        else:
            whose = "a sampled id" if one.place == "sampled" else "context"
            where = f"at turn {one.turn} of {total}, after {one.common} of {one.length} ids, in {whose}"
            yield Remark("prefix_broken", f"{where}: had {list(one.expected)}, got {list(one.found)}")
    if evidence.broken_off and total:
        yield Remark("some_calls_broken_off", f"{evidence.broken_off} of {evidence.broken_off + total} calls")
    for attempt in evidence.given_up:
        told = (attempt.metadata or {}).get("reason")
        yield Remark("retried", f"attempt {attempt.sequence_id}: {attempt.status}" + (f", {told}" if told else ""))


def contradiction(step: int, diagnoses: Sequence[Diagnosis], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words, where the diagnoses of a step differ from its line in metrics.jsonl."""
    line = next(line for line in lines if line["step"] == step)
    counts = Counter(each.account_reason for each in diagnoses)
    told = Counter({name.removeprefix("dropped."): n for name, n in line.items() if name.startswith("dropped.")})
    told[TRAINED] = line["rollouts_trained"]
    differing = sorted(reason for reason in counts | told if counts[reason] != told[reason])
    return [f"step {step}: {reason} {counts[reason]} here, {told[reason]} in metrics.jsonl" for reason in differing]
