"""What the spans of a rollout tell beyond its episode: calls that were broken off, failed, or were not captured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.semconv import AGL_EXCEPTION, MODEL_CALL_NAMES
from lightning_ray.store.schema import read_spans
from lightning_ray.trajectories.episode import calls_of
from lightning_ray.trajectories.join import ModelCall
from lightning_ray.trajectories.selection import answered, captured_calls, of_agents, of_policy
from lightning_ray.types import Attempt

_CALL_NAMES = pa.array([*MODEL_CALL_NAMES.values()])


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


def evidence_of(
    spans: pa.Table, attempts: Mapping[str, str], agent_match: str | None = None, policy: str | None = None
) -> dict[str, Evidence]:
    """The evidence for each rollout with spans, from the attempt that counts, of the policy and the agents to train."""
    counted = spans.filter(pc.is_in(spans["attempt_id"], pa.array(list(attempts.values()), pa.string())))
    captured = of_agents(of_policy(captured_calls(counted), policy), agent_match)
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
