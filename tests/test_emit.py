"""What an agent emits: names letter for letter, shapes, and errors that say what to do."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from lightning_ray import emit_annotation, emit_exception, emit_reward
from lightning_ray.emit import flatten, reward_attributes
from lightning_ray.store.schema import read_spans, spans_to_batch
from lightning_ray.tracing import AttemptTrace, active_trace, traced


@pytest.fixture
def trace() -> AttemptTrace:
    return AttemptTrace("ro-1", "at-1")


def test_a_reward_is_an_annotation_with_the_names_of_agent_lightning(trace: AttemptTrace) -> None:
    before = time.time()
    with traced(trace):
        span = emit_reward(0.5)
    [row] = trace.spans
    assert span.name == row["name"] == "agentlightning.annotation" and span.status.status_code == "OK"
    assert span.attributes == row["attributes"]
    assert span.attributes == {
        "agentlightning.reward.0.name": "primary",
        "agentlightning.reward.0.value": 0.5,
    }
    assert (row["rollout_id"], row["attempt_id"], row["sequence_id"]) == ("ro-1", "at-1", 0)
    assert span.start_time is not None and span.end_time is not None
    assert before <= span.start_time <= span.end_time <= time.time()


def test_the_primary_dimension_comes_first(trace: AttemptTrace) -> None:
    with traced(trace):
        span = emit_reward({"style": 1, "answer": 0.25}, primary_key="answer", attributes={"why": {"a": 1}})
    assert span.attributes == {
        "agentlightning.reward.0.name": "answer",
        "agentlightning.reward.0.value": 0.25,
        "agentlightning.reward.1.name": "style",
        "agentlightning.reward.1.value": 1.0,
        "why.a": 1,
    }


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.int64(1), np.array(1.0), Decimal(1)])
def test_any_real_number_is_a_reward(value: Any) -> None:
    found = reward_attributes(value)["agentlightning.reward.0.value"]
    assert found == 1.0 and type(found) is float


@pytest.mark.parametrize("value", ["1.0", b"1", None, [1.0], 1j, np.array([1.0, 2.0])])
def test_what_is_no_number_is_no_reward(value: Any, trace: AttemptTrace) -> None:
    with traced(trace), pytest.raises(TypeError):
        emit_reward(value)
    with traced(trace), pytest.raises(TypeError):
        emit_reward({"a": 1.0, "b": value}, primary_key="a")
    assert trace.spans == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_what_is_not_finite_is_no_reward(value: Any) -> None:
    with pytest.raises(ValueError, match=r"reward 'primary' is -?(nan|inf); it must be finite"):
        reward_attributes(value)


def test_the_error_names_the_dimension_and_the_value() -> None:
    with pytest.raises(TypeError, match="reward 'b' must be a number, got str 'high'"):
        reward_attributes({"a": 1.0, "b": "high"}, "a")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] needs primary_key="):
        reward_attributes({"b": 1.0, "a": 1.0})
    with pytest.raises(ValueError, match=r"primary_key='c' is not among .*\['a'\]"):
        reward_attributes({"a": 1.0}, "c")


def test_annotations_are_flattened_and_numbered(trace: AttemptTrace) -> None:
    with traced(trace):
        emit_annotation({"a": {"b": {"c": 1}, "d": "x"}, "e": [1, 2]})
        emit_annotation({})
    assert [span["attributes"] for span in trace.spans] == [{"a.b.c": 1, "a.d": "x", "e": [1, 2]}, {}]
    assert [span.sequence_id for span in trace.as_spans()] == [1, 2]
    assert len({span["span_id"] for span in trace.spans}) == 2
    assert flatten({"a": {}}) == {}


def test_an_exception_keeps_its_type_message_and_stack(trace: AttemptTrace) -> None:
    with traced(trace):
        try:
            raise KeyError("lost")
        except KeyError as error:
            span = emit_exception(error)
    assert span.name == "agentlightning.exception"
    assert (span.status.status_code, span.status.description) == ("ERROR", "'lost'")
    attributes = span.attributes
    assert (attributes["exception.type"], attributes["exception.message"]) == ("KeyError", "'lost'")
    assert 'raise KeyError("lost")' in attributes["exception.stacktrace"]


def test_what_was_emitted_comes_back_from_the_store(trace: AttemptTrace) -> None:
    with traced(trace):
        emit_reward({"a": 1.5, "b": 2.0}, primary_key="a")
        emit_exception(ValueError("no"))
    batch = spans_to_batch(trace.spans)
    assert batch["reward"].to_pylist() == [1.5, None]
    first, second = read_spans(batch)
    assert first.attributes == trace.spans[0]["attributes"] and first.status.status_code == "OK"
    assert (second.status.status_code, second.status.description) == ("ERROR", "no")


def test_outside_of_a_rollout_there_is_nothing_to_emit_to(trace: AttemptTrace) -> None:
    with pytest.raises(RuntimeError, match="inside an agent's rollout"):
        emit_reward(1.0)
    with traced(trace), traced(AttemptTrace("ro-2", "at-2")) as inner:
        emit_reward(1.0)
        assert active_trace() is inner
    assert not trace.spans and len(inner.spans) == 1
    with pytest.raises(RuntimeError):
        active_trace()
