"""Which calls count, on spans as the capture writes them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lightning_ray.semconv import SUPERSEDED_SPAN
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.trajectories.account import settle, unusable
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.trajectories.selection import answered, captured_calls, of_agents, rows_where
from lightning_ray.types import Rollout

ROLLOUT = Rollout(rollout_id="ro", input=1, start_time=0.0, status="succeeded")


def call(span_id: str, prompt: list[int], sampled: list[int], **more: Any) -> dict[str, Any]:
    count = len(sampled)
    return {
        "rollout_id": "ro",
        "attempt_id": "at",
        "sequence_id": 0,
        "trace_id": "t",
        "span_id": span_id,
        "name": "openai.chat.completion",
        "status": "OK",
        "prompt_ids": prompt,
        "sampled_ids": sampled,
        "logprobs": [-0.5] * count,
        "weight_versions": [0] * count,
        "attributes": {},
        **more,
    }


def again(name: str) -> dict[str, Any]:
    """The mark of a retry that stands in the place of the call ``name``."""
    nothing = dict.fromkeys(("prompt_ids", "sampled_ids", "logprobs", "weight_versions"))
    return call(f"mark-{name}", [], [], name=SUPERSEDED_SPAN, parent_id=name) | nothing


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_batches([spans_to_batch(rows)])


def episode(*rows: dict[str, Any], agent_match: str | None = None) -> Episode:
    reward = call("reward", [], [], name="agentlightning.annotation", attributes={"agentlightning.reward.0.value": 1.0})
    reward |= dict.fromkeys(("prompt_ids", "sampled_ids", "logprobs", "weight_versions"))
    [found] = read_episodes([ROLLOUT], table(*rows, reward), {"ro": "at"}, agent_match)
    return found


def test_a_call_that_was_sent_again_counts_once() -> None:
    first, second, alike = call("a", [1], [7]), call("b", [1], [8]), call("c", [1], [9])
    spans = table(first, again("a"), second, alike)
    assert captured_calls(spans)["span_id"].to_pylist() == ["b", "c"]
    found = episode(first, again("a"), second, alike)
    assert found.calls == 2 and [t.token_ids.tolist() for t in found.trajectories] == [[1, 8], [1, 9]]


def test_rows_are_chosen_and_not_copied_where_all_are() -> None:
    spans = table(call("a", [1], [7]), call("b", [1], [8]))
    assert rows_where(spans, pc.is_valid(spans["prompt_ids"])) is spans
    assert rows_where(spans, pc.equal(spans["span_id"], "b"))["span_id"].to_pylist() == ["b"]
    none = spans.slice(0, 0)
    assert rows_where(none, pc.is_valid(none["prompt_ids"])).num_rows == 0


def test_calls_that_broke_off_are_captured_and_do_not_count() -> None:
    spans = table(call("a", [1], [7], status="ERROR"), call("b", [1], [8]))
    assert captured_calls(spans).num_rows == 2
    assert answered(captured_calls(spans))["span_id"].to_pylist() == ["b"]


CONVERSATION = (
    call("w1", [1], [7], agent="writer"),
    call("c1", [2, 7], [3], agent="checker"),
    call("w2", [1, 7, 3], [8], agent="rewriter"),
    call("x", [5], [6]),
)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (None, ["w1", "c1", "w2", "x"]),
        ("writ", ["w1", "w2"]),
        ("^writer|checker$", ["w1", "c1"]),
        ("^$", ["x"]),
        ("nobody", []),
    ],
)
def test_the_calls_of_the_agents_to_train(match: str | None, expected: list[str]) -> None:
    assert of_agents(captured_calls(table(*CONVERSATION)), match)["span_id"].to_pylist() == expected


def test_one_agent_of_several_is_trained() -> None:
    found = episode(*CONVERSATION, agent_match="writer")
    [trajectory] = found.trajectories
    assert trajectory.token_ids.tolist() == [1, 7, 3, 8] and trajectory.mask.tolist() == [0, 1, 0, 1]
    assert (found.calls, found.sampled_tokens, found.reward) == (4, 2, 1.0)


def test_a_rollout_without_a_call_of_those_agents_is_dropped_by_name() -> None:
    found = episode(*CONVERSATION, agent_match="nobody")
    assert unusable(found) == "no_call_of_agent"
    assert settle([found], {"ro": "g"}).dropped == {"ro": "no_call_of_agent"}
