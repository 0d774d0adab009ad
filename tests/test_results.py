"""What an agent may return, and the spans that come of it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import lightning_ray as lr
from lightning_ray.results import spans_of_result
from lightning_ray.tracing import AttemptTrace, traced


@pytest.fixture
def trace() -> AttemptTrace:
    return AttemptTrace("ro-1", "at-1")


def rewards(trace: AttemptTrace) -> list[dict[str, float]]:
    spans = [lr.Span.model_validate(row) for row in trace.spans]
    return [{one.name: one.value for one in lr.get_rewards_from_span(span)} for span in spans]


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1), Decimal(1)])
def test_a_number_is_the_reward(value: Any, trace: AttemptTrace) -> None:
    assert spans_of_result(value, trace) == trace.spans and rewards(trace) == [{"primary": 1.0}]
    assert trace.spans[0]["name"] == "agentlightning.annotation"


def test_nothing_adds_nothing(trace: AttemptTrace) -> None:
    assert spans_of_result(None, trace) == [] == spans_of_result([], trace) == trace.spans


def test_a_map_is_rewards_by_name(trace: AttemptTrace) -> None:
    spans_of_result({"exact": 0.5}, trace)
    spans_of_result({"style": 1, "primary": 0.25}, trace)
    assert rewards(trace) == [{"exact": 0.5}, {"primary": 0.25, "style": 1.0}]
    assert lr.find_final_reward([lr.Span.model_validate(row) for row in trace.spans]) == 0.25


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", r"returned str '0.5'.*return a number"),
        (float("nan"), r"returned float nan.*must be finite"),
        ({"a": 1.0, "b": 2.0}, r"returned dict .*primary_key='primary' is not among .*one called 'primary'"),
        ({}, "returned dict"),
        ({"a": "x"}, "returned dict .*reward 'a' must be a number"),
        ([1.0], r"returned a list with float 1.0; return a number"),
        (object(), "returned object"),
    ],
)
def test_anything_else_is_named_with_what_may_be_returned(value: Any, message: str, trace: AttemptTrace) -> None:
    with pytest.raises(lr.AgentError, match=f"agent 'mine' {message}") as error:
        spans_of_result(value, trace, "mine")
    assert isinstance(error.value, ValueError) and trace.spans == []


def test_a_coroutine_that_no_one_awaits_is_explained(trace: AttemptTrace) -> None:
    async def forgotten() -> float:
        return 1.0

    coroutine = forgotten()
    with pytest.raises(lr.AgentError, match="make the agent 'async def'"):
        spans_of_result(coroutine, trace)
    coroutine.close()


def test_spans_are_added_as_the_attempts(trace: AttemptTrace) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("elsewhere").start_as_current_span("otel", attributes={"a": [1]}):
        pass
    core = lr.emit_reward(0.5, propagate=False)
    ours = lr.Span.from_attributes(attributes={"b": 2}, name="ours", start_time=1.0, end_time=2.0)
    added = spans_of_result([*exporter.get_finished_spans(), core, ours], trace)
    assert added == trace.spans and [row["name"] for row in added] == ["otel", core.name, "ours"]
    assert {(row["rollout_id"], row["attempt_id"]) for row in added} == {("ro-1", "at-1")}
    assert {row["sequence_id"] for row in added} == {0}
    assert added[0]["attributes"] == {"a": [1]} and added[2]["span_id"] == ours.span_id
    assert (added[1]["start_time"], added[1]["end_time"]) == (core.start_time, core.end_time)
    assert [lr.Span.model_validate(row) for row in added][2].end_time == 2.0


def test_spans_that_were_recorded_are_not_added_again(trace: AttemptTrace) -> None:
    exporter = InMemorySpanExporter()
    with traced(trace):
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        provider.get_tracer("agent").start_span("once").end()
    assert spans_of_result(list(exporter.get_finished_spans()), trace) == [] and len(trace.spans) == 1


def test_a_span_of_another_rollout_is_refused(trace: AttemptTrace) -> None:
    span = lr.Span.from_attributes(attributes={}, rollout_id="ro-2", attempt_id="at-1", name="x")
    with pytest.raises(lr.AgentError, match="span 'x' of rollout 'ro-2', attempt 'at-1' in rollout 'ro-1'"):
        spans_of_result([span], trace)
