"""What is particular to one rollout, in words: the figures behind its reason, and oddities that leave nobody out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_ray.trajectories.account import Account, unusable
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.evidence import Evidence
from lightning_ray.trajectories.prefix import Break


@dataclass(frozen=True)
class Remark:
    """Something odd about a rollout."""

    kind: str
    text: str


def finer_reason(evidence: Evidence) -> str:
    """Why no model call counts."""
    if evidence.broken_off:
        return "calls_broken_off"
    if evidence.untold:
        return "no_token_ids"
    return "calls_failed" if evidence.failed else "no_model_call"


def detail_of(episode: Episode, reason: str, evidence: Evidence) -> str | None:
    """What is particular to this rollout, beside what the account tells of it."""
    rollout = episode.rollout
    told: str | None = ((rollout.metadata or {}).get("failure") or {}).get("reason")
    if reason == "evaluation":
        problem = unusable(episode)
        return None if problem is None else f"{problem}: {told or evidence.exception or rollout.status}"
    if rollout.status == "failed":
        return told or evidence.exception
    if reason == "at_work":
        return rollout.status
    if reason == "calls_broken_off":
        return f"{evidence.broken_off} calls broken off"
    if reason == "no_token_ids":
        return f"{evidence.untold} calls of another model"
    if reason == "calls_failed":
        return f"{len(evidence.failed)} calls, the last: {evidence.failed[-1]}"
    return None


def remarks_on(episode: Episode, evidence: Evidence, breaks: Sequence[Break], account: Account) -> Iterable[Remark]:
    """What its calls, its attempts and its account tell."""
    yield from _of_calls(episode, evidence, breaks)
    for attempt in evidence.given_up:
        told = (attempt.metadata or {}).get("reason")
        yield Remark("retried", f"attempt {attempt.sequence_id}: {attempt.status}" + (f", {told}" if told else ""))
    yield from _of_rows(episode.rollout_id, account)


def _of_calls(episode: Episode, evidence: Evidence, breaks: Sequence[Break]) -> Iterable[Remark]:
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


def _of_rows(rollout_id: str, account: Account) -> Iterable[Remark]:
    for reason, count in account.rows_dropped.get(rollout_id, {}).items():
        yield Remark("rows_dropped", f"{count} of its rows: {reason}")
    if cut := account.rows_truncated.get(rollout_id):
        yield Remark("rows_truncated", f"{cut} of its rows")
    if penalty := account.penalties.get(rollout_id):
        yield Remark("overlong", f"reward {penalty:+.3g}")
