"""Which model calls of a table of spans count: answered in full, not sent again, of the policy and agents to train."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.semconv import SUPERSEDED_SPAN


def rows_where(table: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    """The rows with a true ``mask``; the table itself if all have, as copying tokens takes its time."""
    return table if pc.all(mask, min_count=0).as_py() else table.filter(mask)


def captured_calls(spans: pa.Table) -> pa.Table:
    """The model calls with token ids, less those that their clients gave up and sent again."""
    calls = rows_where(spans, pc.is_valid(spans["prompt_ids"]))
    again = pc.drop_null(spans["parent_id"].filter(pc.equal(spans["name"], SUPERSEDED_SPAN)))
    if not len(again):
        return calls
    return calls.filter(pc.invert(pc.is_in(calls["span_id"], value_set=again)))


def answered(calls: pa.Table) -> pa.Table:
    """Those that came to their end: nothing the agent did follows from a call that was broken off."""
    return rows_where(calls, pc.equal(calls["status"], "OK"))


def of_policy(calls: pa.Table, policy: str | None) -> pa.Table:
    """Those that the policy of this name answered; all without one."""
    return calls if policy is None else rows_where(calls, pc.fill_null(pc.equal(calls["model"], policy), False))


def of_agents(calls: pa.Table, agent_match: str | None) -> pa.Table:
    """Those of agents in whose name the regular expression is found; all without one. A call that names no agent is of
    the agent ``""``.
    """
    if agent_match is None:
        return calls
    names = pc.fill_null(calls["agent"], "")
    wanted = [name for name in pc.unique(names).to_pylist() if re.search(agent_match, name)]
    return rows_where(calls, pc.is_in(names, value_set=pa.array(wanted, pa.string())))
