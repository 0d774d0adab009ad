"""What must hold after chaos: read from the run's folder alone, against what witnesses noted down meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.chaos_agent import read_notes
from lightning_ray.run.folder import RunFolder
from lightning_ray.store import open_folder
from lightning_ray.types import TERMINAL_ROLLOUT, Attempt, Rollout


def check(
    folder: RunFolder, notes: Path, finished: Mapping[str, str], probed: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """What was lost, and what counts twice.

    ``finished``: rollout -> attempt, of which the store told that they had succeeded. ``probed``: rollout and span
    ids whose append it acknowledged.
    """
    view = open_folder(folder.store)
    apart = {rollout_id for rollout_id, _ in probed}
    rollouts = {r.rollout_id: r for r in view.query_rollouts() if r.rollout_id not in apart}
    attempts = {rollout_id: view.query_attempts(rollout_id).items for rollout_id in rollouts}
    spans = view.table()
    settled = [rollout_id for line in folder.steps().values() for _, ids in line["groups"] for rollout_id in ids]
    trained = set(settled)
    return {
        "rollouts": len(rollouts),
        "attempts": sum(len(each) for each in attempts.values()),
        "rollouts_by_status": dict(Counter(rollout.status for rollout in rollouts.values())),
        "played_again_after_restart": sum(is_played_again(each, trained) for each in rollouts.values()),
        "lost_rollouts": len(lost(rollouts, attempts, finished, trained)),
        "duplicate_rollouts": len(settled) - len(trained) + duplicates(attempts, spans),
        "acknowledged_spans": len(probed) + len(read_notes(notes)),
        "lost_acknowledged_spans": lost_answers(notes, spans) + len(set(probed) - probes(spans)),
        "steps_missing": len(set(range(max(folder.steps(), default=-1) + 1)) - folder.steps().keys()),
    }


def lost(
    rollouts: Mapping[str, Rollout],
    attempts: Mapping[str, Sequence[Attempt]],
    finished: Mapping[str, str],
    trained: set[str],
) -> set[str]:
    """Rollouts that have not ended, whose good end is not known any more, or that are not there."""
    still_open = {rollout_id for rollout_id, rollout in rollouts.items() if rollout.status not in TERMINAL_ROLLOUT}
    forgotten = {
        rollout_id
        for rollout_id, attempt_id in finished.items()
        if attempt_id not in {a.attempt_id for a in attempts.get(rollout_id, ()) if a.status == "succeeded"}
    }
    return still_open | forgotten | (trained - rollouts.keys())


def is_played_again(rollout: Rollout, trained: set[str]) -> bool:
    """Whether it ended well and yet was in no step: its task was played again after a restart from a checkpoint."""
    return rollout.mode == "train" and rollout.status == "succeeded" and rollout.rollout_id not in trained


def duplicates(attempts: Mapping[str, Sequence[Attempt]], spans: pa.Table) -> int:
    """Rollouts of which two attempts succeeded, or the one that did has not just one reward."""
    rewards = spans.filter(pc.is_valid(spans["reward"]))
    rewarded = Counter(rewards["attempt_id"].to_pylist())
    count = 0
    for each in attempts.values():
        good = [attempt.attempt_id for attempt in each if attempt.status == "succeeded"]
        count += len(good) > 1 or (len(good) == 1 and rewarded[good[0]] != 1)
    return count


def lost_answers(notes: Path, spans: pa.Table) -> int:
    """Answers that agents noted down and that no captured call of their attempt has, id for id."""
    calls = spans.filter(pc.is_valid(spans["sampled_ids"])).select(["attempt_id", "sampled_ids"])
    stored: defaultdict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for attempt_id, ids in zip(calls["attempt_id"].to_pylist(), calls["sampled_ids"].to_pylist(), strict=True):
        stored[attempt_id][tuple(ids)] += 1
    noted: defaultdict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for note in read_notes(notes):
        noted[note["attempt"]][tuple(note["ids"])] += 1
    return sum((answers - stored[attempt_id]).total() for attempt_id, answers in noted.items())


def probes(spans: pa.Table) -> set[tuple[str, str]]:
    """Rollout and span ids of the probe's spans."""
    found = spans.filter(pc.equal(spans["name"], "probe"))
    return set(zip(found["rollout_id"].to_pylist(), found["span_id"].to_pylist(), strict=True))


def swaps(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Swaps without a proof, and tokens of weights that were not proved."""
    return {
        "unproved_swaps": summary["swaps"] - summary["swaps_proved"],
        **{name: summary[name] for name in ("swaps", "unproved_tokens_trained", "stale_tokens_beyond_bound")},
    }


def noise(one: float, other: float, tasks: int) -> float:
    """How far two mean rewards of so many tasks each, one draw a task, may be apart by chance (95%).

    Of rewards in [0, 1] a success has the largest variance; three tasks are the least, as no draw has none.
    """
    return max(1.96 * sqrt((one * (1 - one) + other * (1 - other)) / tasks), 3 / tasks)
