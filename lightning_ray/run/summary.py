"""The figures at the end of a run, for people and for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning_ray.run.phases import shares
from lightning_ray.run.state import ONLY, PolicyState, RunState

MOMENTS = ("before", "after")


def summarize(
    state: RunState, seconds: float, peak_memory: int, rows: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The content of summary.json. Rewards and shares are in [0, 1] if the agent's are; memory in 10^9 bytes.

    ``rows`` are those of metrics.jsonl.
    """
    policies = state.policies.values()
    several = {
        name: policy_summary(policy) for name, policy in state.policies.items() if list(state.policies) != [ONLY]
    }
    return {
        "seconds_total": round(seconds, 1),
        "seconds_to_first_step": state.seconds_to_first_step and round(state.seconds_to_first_step, 1),
        "steps": state.step,
        "step_seconds_median": median(state.step_seconds),
        **{split: split_summary(state, split) for split in ("val", "test")},
        "rollouts": state.rollouts,
        "rollouts_trained": state.total("rollouts_trained"),
        "rollouts_dropped": state.rollouts_dropped,
        "swaps": state.total("swaps"),
        "swaps_proved": state.total("swaps_proved"),
        "trainer_restarts": state.trainer_restarts,
        "unproved_tokens_trained": state.total("unproved_tokens_trained"),
        "stale_tokens_beyond_bound": state.total("stale_tokens_beyond_bound"),
        "max_logprob_diff": max((policy.max_logprob_diff for policy in policies), default=0.0),
        "swap_ms_median": median([ms for policy in policies for ms in policy.swap_ms]),
        "time_shares": time_shares(rows),
        "tokens_sampled": state.total("tokens_sampled"),
        "tokens_trained": state.total("tokens_trained"),
        "peak_memory_gb": round(peak_memory / 1e9, 2),
        **({"policies": several} if several else {}),
    }


def policy_summary(state: PolicyState) -> dict[str, Any]:
    """What is one policy's own; what the run counts is the sum over policies then."""
    counters = {name: value for name, value in asdict(state).items() if name != "swap_ms"}
    return {**counters, "swap_ms_median": median(state.swap_ms)}


def median(values: list[float]) -> float | None:
    """The median, or None of nothing."""
    return round(statistics.median(values), 3) if values else None


def time_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The parts of the phases in the time that the rows of steps account for."""
    seconds: dict[str, float] = {}
    for row in rows:
        for name, share in row.items():
            if name.startswith("time."):
                phase = name.removeprefix("time.")
                seconds[phase] = seconds.get(phase, 0.0) + share * row["wall_seconds"]
    return {name: round(share, 4) for name, share in shares(seconds).items()}


def split_summary(state: RunState, split: str) -> dict[str, Any]:
    """Sampled, greedy, annotations (greedy) and turns (greedy) of one data set, before and after."""
    figures: dict[str, Any] = {}
    for moment in MOMENTS:
        for mode in ("sampled", "greedy"):
            found = state.evaluations.get(f"{split}.{mode}_{moment}")
            if found is None:
                continue
            figures[f"{mode}_{moment}"] = found["reward"]
            if mode == "greedy":
                figures[f"turns_{moment}"] = found["turns"]
                for key, value in found["annotations"].items():
                    figures[f"{key}_{moment}"] = value
    return figures


def summary_table(state: RunState) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the closing table: a row a figure, before and after for each data set."""
    splits = {split: figures for split in ("val", "test") if (figures := split_summary(state, split))}
    names = sorted({key.rsplit("_", 1)[0] for figures in splits.values() for key in figures}, key=_order)
    columns = ["", *(f"{split} {moment}" for split in splits for moment in MOMENTS)]
    rows = [
        [name, *(_cell(splits[split].get(f"{name}_{moment}")) for split in splits for moment in MOMENTS)]
        for name in names
    ]
    return columns, rows


def _order(name: str) -> tuple[int, str]:
    first = ("sampled", "greedy")
    return (first.index(name) if name in first else len(first), name)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
