"""The tables that SQL sees, column by column, and which of them a query needs.

``spans`` is a view over the stored columns that adds what a reader asks for (latency, weight version, the
reward of a call's attempt); the others are small and made from the store's objects. Only columns that a query
names are made: ``Needs`` says which. Making them is left to ``sql_picture``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lightning_ray.errors import StoreError

Needs = Mapping[str, frozenset[str]]
"""The columns that a query may read, by table; a table that is not there is not read."""


class Column(NamedTuple):
    """A column as SQL sees it; ``made_of`` is SQL over the stored columns, if it is not stored itself."""

    type: str
    what: str
    made_of: str | None = None


_IDS = {"rollout_id": Column("VARCHAR", "the rollout"), "attempt_id": Column("VARCHAR", "the attempt")}
_TIMES = {
    "start_time": Column("DOUBLE", "Unix seconds"),
    "end_time": Column("DOUBLE", "Unix seconds; null while it lasts"),
    "seconds": Column("DOUBLE", "end_time - start_time", "s.end_time - s.start_time"),
}
_REWARD = "the final reward: the last primary reward of the attempt"

TABLES: dict[str, dict[str, Column]] = {
    "spans": {
        **_IDS,
        "sequence_id": Column("INTEGER", "the order within the rollout"),
        "trace_id": Column("VARCHAR", "the trace"),
        "span_id": Column("VARCHAR", "the span"),
        "parent_id": Column("VARCHAR", "the span it is part of"),
        "name": Column("VARCHAR", "what was done, e.g. openai.chat.completion"),
        "start_time": Column("DOUBLE", "Unix seconds"),
        "end_time": Column("DOUBLE", "Unix seconds"),
        "latency_ms": Column("DOUBLE", "milliseconds from start to end", "(s.end_time - s.start_time) * 1000"),
        "status": Column("VARCHAR", "UNSET, OK or ERROR"),
        "agent": Column("VARCHAR", "who called the model"),
        "model": Column("VARCHAR", "the model that was called; null if the span is no model call"),
        "weight_version": Column("INTEGER", "weights that sampled the last token", "s.weight_versions[-1]"),
        "prompt_tokens": Column("BIGINT", "number of prompt ids", "len(s.prompt_ids)"),
        "sampled_tokens": Column("BIGINT", "number of sampled ids", "len(s.sampled_ids)"),
        "finish_reason": Column("VARCHAR", "why sampling ended"),
        "reward": Column(
            "DOUBLE",
            "the span's own reward; of a model call without one, the final reward of its attempt",
            "coalesce(s.reward, CASE WHEN s.model IS NOT NULL OR s.finish_reason IS NOT NULL THEN r.reward END)",
        ),
        "own_reward": Column("DOUBLE", "the reward that this very span carries", "s.reward"),
        "prompt_ids": Column("INTEGER[]", "the prompt's tokens"),
        "sampled_ids": Column("INTEGER[]", "the sampled tokens"),
        "logprobs": Column("FLOAT[]", "of the sampled tokens"),
        "weight_versions": Column("INTEGER[]", "of the weights that sampled each token"),
        "more": Column("BLOB", "all else, packed: read it with attribute(more, 'key')"),
    },
    "rollouts": {
        "rollout_id": Column("VARCHAR", "the rollout"),
        "status": Column("VARCHAR", "queuing, preparing, running, succeeded, failed, cancelled or requeuing"),
        "mode": Column("VARCHAR", "train, val or test"),
        **_TIMES,
        "attempts": Column("INTEGER", "number of attempts"),
        "attempt_id": Column("VARCHAR", "the last attempt"),
        "reward": Column("DOUBLE", _REWARD, "r.reward"),
        "resources_id": Column("VARCHAR", "the resources it was given"),
        "input": Column("VARCHAR", "the task, as JSON"),
        "metadata": Column("VARCHAR", "as JSON"),
        "config": Column("VARCHAR", "timeouts and retries, as JSON"),
    },
    "attempts": {
        **_IDS,
        "sequence_id": Column("INTEGER", "1 for the first attempt"),
        "status": Column("VARCHAR", "preparing, running, succeeded, failed, timeout or unresponsive"),
        "worker_id": Column("VARCHAR", "the worker at it"),
        **_TIMES,
        "last_heartbeat_time": Column("DOUBLE", "Unix seconds"),
        "reward": Column("DOUBLE", _REWARD, "r.reward"),
        "metadata": Column("VARCHAR", "as JSON"),
    },
    "workers": {
        "worker_id": Column("VARCHAR", "the worker"),
        "status": Column("VARCHAR", "idle, busy or unknown"),
        "last_heartbeat_time": Column("DOUBLE", "Unix seconds"),
        "last_dequeue_time": Column("DOUBLE", "Unix seconds"),
        "last_busy_time": Column("DOUBLE", "Unix seconds"),
        "last_idle_time": Column("DOUBLE", "Unix seconds"),
        "current_rollout_id": Column("VARCHAR", "what it is at"),
        "current_attempt_id": Column("VARCHAR", "what it is at"),
        "heartbeat_stats": Column("VARCHAR", "what it last told of itself, as JSON"),
    },
    "resources": {
        "resources_id": Column("VARCHAR", "the resources"),
        "version": Column("INTEGER", "how often they were published with a new content"),
        "create_time": Column("DOUBLE", "Unix seconds"),
        "update_time": Column("DOUBLE", "Unix seconds"),
        "names": Column("VARCHAR[]", "the names of what is in them"),
        "latest": Column("BOOLEAN", "whether they were published last"),
    },
}
EVERYTHING: Needs = {table: frozenset(columns) for table, columns in TABLES.items()}

SMALLEST = {
    "spans": "sequence_id",
    "rollouts": "rollout_id",
    "attempts": "sequence_id",
    "workers": "worker_id",
    "resources": "resources_id",
}
"""What is read of a table if a query only counts its rows."""
_REWARDS = (
    "(SELECT rollout_id, attempt_id, max_by(reward, (sequence_id, end_time)) AS reward "
    "FROM _spans WHERE reward IS NOT NULL GROUP BY ALL)"
)

_STORED = re.compile(r"\bs\.(\w+)")


def names_of(needs: Needs) -> list[str]:
    """The needed columns as ``table.column``, in order."""
    return [
        f"{table}.{column}"
        for table, columns in TABLES.items()
        if table in needs
        for column in columns
        if column in needs[table]
    ]


def needs_of(names: Iterable[str]) -> Needs:
    """The inverse of ``names_of``. Raises StoreError for a name that there is not."""
    columns: dict[str, set[str]] = {}
    for name in names:
        table, _, column = name.partition(".")
        if column not in TABLES.get(table, ()):
            raise StoreError(f"there is no column {name!r}; columns are named as columns_needed does: 'spans.agent'")
        columns.setdefault(table, set()).add(column)
    return {table: frozenset(of_table) for table, of_table in columns.items()}


def stored_columns(table: str, needed: frozenset[str]) -> frozenset[str]:
    """The stored columns behind the needed ones of a table, but for the spans'; never none."""
    behind = {SMALLEST[table]}
    for name in needed:
        made_of = TABLES[table][name].made_of
        behind |= {name} if made_of is None else set(_STORED.findall(made_of))
    if "reward" in needed:
        behind |= {"rollout_id", "attempt_id"}
    return frozenset(behind)


def union_sql(tables: Iterable[str]) -> str:
    """``_spans``, all that is stored of spans: of the tables those named ``_spans_`` and a number."""
    parts = [f"SELECT * FROM {table}" for table in tables if table.startswith("_spans_")]
    return " UNION ALL ".join(parts) or "SELECT NULL LIMIT 0"


def view_sql(table: str, needed: frozenset[str]) -> str:
    """The view of a table with the needed columns, over ``_table`` and ``_spans`` with the stored columns."""
    chosen = {name: column for name, column in TABLES[table].items() if name in needed}
    columns = ", ".join(f'{column.made_of or f"s.{name}"} AS "{name}"' for name, column in chosen.items())
    join = f" LEFT JOIN {_REWARDS} r USING (rollout_id, attempt_id)" if "reward" in chosen else ""
    return f"SELECT {columns} FROM _{table} s{join}"
