"""One play of a task, as an evaluation counts it: its reward or why there is none, its turns, and what it took."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.relay.settings import Prices
from lightning_ray.relay.spend import Spend, Usage
from lightning_ray.run.rollouts import read_ended
from lightning_ray.semconv import MODEL_CALL_NAMES, SUPERSEDED_SPAN
from lightning_ray.store.base import Store
from lightning_ray.store.packing import unpack
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.usable import FAILURES

Tags = Callable[[Any], Iterable[str]]
"""The tags of a task."""
POLICY = "policy"
"""The endpoint that calls with token ids are counted under."""
CHUNK = 512
"""Rollouts whose spans are held at once."""
AGENT = ("agent_failed", "timed_out", "unresponsive", "no_reward", "reward_not_finite")
"""Failures that the agent, or the model in it, has to answer for. All others are the infrastructure's."""


@dataclass(frozen=True)
class Play:
    """One rollout of a task."""

    task: int
    """Its number in the data set."""
    key: str
    """The same for the same task in another evaluation."""
    rollout_id: str
    reward: float | None
    failure: str | None = None
    """Why there is no reward, in the words of a run's account."""
    reason: str | None = None
    turns: int = 0
    """Answered calls of the model that is evaluated, in the attempt that counts."""
    sampled_tokens: int = 0
    seconds: float | None = None
    tags: tuple[str, ...] = ()
    annotations: Mapping[str, Sequence[float]] = field(default_factory=dict)
    spend: Mapping[str, Spend] = field(default_factory=dict)
    """By endpoint, over all attempts."""


def plays_of(
    episodes: Sequence[Episode],
    calls: Mapping[str, Calls] | None = None,
    tags: Tags | None = None,
    models: Collection[str] = (POLICY,),
) -> list[Play]:
    """The plays of finished rollouts. ``calls`` has what their spans tell by rollout; ``models`` names the endpoints
    that are evaluated.
    """
    found = []
    for place, episode in enumerate(episodes):
        rollout = episode.rollout
        failure, reason = failure_of(episode)
        made = (calls or {}).get(rollout.rollout_id)
        seconds = None if rollout.end_time is None else rollout.end_time - rollout.start_time
        found.append(
            Play(
                task=(rollout.metadata or {}).get("task", place),
                key=task_key(rollout.input),
                rollout_id=rollout.rollout_id,
                reward=episode.reward if failure is None else None,
                failure=failure,
                reason=reason,
                turns=episode.calls if made is None else sum(made.turns.get(name, 0) for name in models),
                sampled_tokens=episode.sampled_tokens if made is None else sum(map(made.sampled, models)),
                seconds=seconds,
                tags=tuple(dict.fromkeys(map(str, (tags or tags_of)(rollout.input)))),
                annotations=episode.annotations,
                spend={} if made is None else dict(made.spend),
            )
        )
    return found


def failure_of(episode: Episode) -> tuple[str | None, str | None]:
    """Why a rollout has no reward that counts, and the words for it; None twice if it has."""
    if episode.rollout.status == "cancelled":
        return "cancelled", None
    if episode.rollout.status != "succeeded":
        told = (episode.rollout.metadata or {}).get("failure") or {}
        return FAILURES.get(str(told.get("kind")), "agent_failed"), told.get("reason")
    if episode.reward is None:
        return "no_reward", None
    return (None, None) if math.isfinite(episode.reward) else ("reward_not_finite", f"reward {episode.reward}")


def tags_of(task: Any) -> list[str]:
    """A task's ``tags`` and ``tag``, if it is a mapping that has them."""
    if not isinstance(task, Mapping):
        return []
    tags, tag = task.get("tags"), task.get("tag")
    several = [] if tags is None else [tags] if isinstance(tags, str) else list(tags)
    return [str(each) for each in ([tag] if tag is not None else []) + several]


def task_key(task: Any) -> str:
    """A short name of a task's content."""
    content = json.dumps(task, sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


async def read_plays(store: Store, rollout_ids: Sequence[str], prices: Prices | None = None) -> list[Play]:
    """The plays of rollouts that have ended, read from a store of any algorithm's."""
    plays: list[Play] = []
    for begin in range(0, len(rollout_ids), CHUNK):
        ended = await read_ended(store, rollout_ids[begin : begin + CHUNK])
        calls = calls_by_rollout(ended.spans, ended.attempts, prices or Prices())
        plays += plays_of(ended.episodes(), calls)
    return plays


@dataclass
class Calls:
    """A rollout's captured calls by endpoint."""

    turns: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    spend: defaultdict[str, Spend] = field(default_factory=lambda: defaultdict(Spend))

    def sampled(self, endpoint: str) -> int:
        """Tokens that an endpoint sampled."""
        return self.spend[endpoint].completion_tokens if endpoint in self.spend else 0


def calls_by_rollout(
    spans: pa.Table, attempts: Mapping[str, str], prices: Prices, several: Collection[str] = ()
) -> dict[str, Calls]:
    """What captured calls took, by rollout: those of the policy (or of ``several`` by name), at these prices, and of
    the relay, at its own.

    ``attempts`` names the attempt whose turns count. Calls that only the agent's client told of are not captured.
    """
    again = set(pc.drop_null(spans["parent_id"].filter(pc.equal(spans["name"], SUPERSEDED_SPAN))).to_pylist())
    found: defaultdict[str, Calls] = defaultdict(Calls)
    for call in _captured(spans):
        own = call["model"] if call["model"] in several else POLICY
        endpoint = own if call["own"] else str(call["upstream"])
        calls, usage = found[call["rollout_id"]], Usage.of(call["usage"])
        price = usage.cost(prices) if call["own"] and usage is not None else float(call["cost"] or 0.0)
        ok = call["status"] == "OK"
        calls.spend[endpoint].add(usage, price, failed=not ok, answered=ok)
        counts = attempts.get(call["rollout_id"]) == call["attempt_id"] and call["span_id"] not in again
        calls.turns[endpoint] += ok and counts
    return dict(found)


def _captured(spans: pa.Table) -> Iterator[dict[str, Any]]:
    names = pa.array(list(MODEL_CALL_NAMES.values()), pa.string())
    own = pc.is_valid(spans["prompt_ids"])
    table = spans.append_column("own", own)
    table = table.filter(pc.or_(own, pc.is_in(spans["name"], names)))
    table = table.select(["rollout_id", "attempt_id", "span_id", "status", "model", "more", "own"])
    for row in table.to_pylist():
        attributes = unpack(row.pop("more")).get("attributes") or {}
        upstream = attributes.get("upstream")
        if row["own"] or upstream is not None:
            yield {**row, "upstream": upstream, "cost": attributes.get("cost"), "usage": attributes.get("usage") or {}}
