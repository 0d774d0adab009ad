"""The tracers of Agent Lightning 0.3, as a user drives them alone."""

from __future__ import annotations

import asyncio
from typing import Any

import cloudpickle
import pytest
from opentelemetry import trace as api

import lightning_ray as lr
from lightning_ray.tracing import AttemptTrace, traced


class Kept:
    """A store that keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[lr.Span] = []

    async def add_many_spans(self, spans: list[lr.Span]) -> list[lr.Span]:
        self.spans += spans
        return spans


async def test_a_trace_is_there_when_its_context_ends() -> None:
    tracer = lr.OtelTracer()
    async with tracer.trace_context("run") as otel:
        with otel.start_as_current_span("step"):
            lr.emit_reward(0.5)
        assert [span.name for span in tracer.get_last_trace()] == ["agentlightning.annotation", "step"]
    spans = tracer.get_last_trace()
    assert [span.name for span in spans] == ["agentlightning.annotation", "step"]
    assert lr.find_final_reward(spans) == 0.5 and spans[0].parent_id == spans[1].span_id
    assert lr.get_active_tracer() is None


async def test_spans_go_to_the_store_under_their_ids() -> None:
    store: Any = Kept()
    tracer = lr.AgentOpsTracer(agentops_managed=True)
    with tracer.lifespan(store):
        assert tracer.worker_id == 0
        async with tracer.trace_context(rollout_id="ro-1", attempt_id="at-1"):
            lr.emit_message("hello")
    assert [(span.rollout_id, span.attempt_id, span.name) for span in store.spans] == [
        ("ro-1", "at-1", "agentlightning.message")
    ]
    with pytest.raises(ValueError, match="must be given together"):
        async with tracer.trace_context(rollout_id="ro-1"):
            pass
    with pytest.raises(ValueError, match="only into a store"):
        async with lr.OtelTracer().trace_context(rollout_id="ro-1", attempt_id="at-1"):
            pass


async def test_one_tracer_traces_many_at_once() -> None:
    tracer = lr.OtelTracer()

    async def run(index: int) -> list[lr.Span]:
        async with tracer.trace_context():
            await asyncio.sleep(0)
            lr.emit_annotation({"index": index})
            await asyncio.sleep(0)
        return tracer.get_last_trace()

    for index, spans in enumerate(await asyncio.gather(*map(run, range(50)))):
        assert [span.attributes for span in spans] == [{"index": index}]


async def test_a_function_may_have_a_trace_of_its_own() -> None:
    tracer = lr.OtelTracer()

    async def emitting(message: str) -> str:
        lr.emit_message(message)
        return message

    assert await tracer.trace_run_async(emitting, "hello") == "hello"
    assert [lr.get_message_value(span) for span in tracer.get_last_trace()] == ["hello"]


def test_an_operation_is_recorded_with_its_failure() -> None:
    tracer = lr.OtelTracer()
    with traced(AttemptTrace("r", "a")) as trace:
        with pytest.raises(KeyError), tracer.operation_context("work", {"a": 1}, start_time=5.0, end_time=7.5) as op:
            op.record_attributes({"b": 2})
            api.get_current_span().set_attribute("c", 3)
            raise KeyError("gone")
        span = tracer.create_span("event", {"x": 1}, timestamp=3.0)
        with pytest.raises(ValueError, match="not ended"), tracer.operation_context("open") as op:
            op.get_recorded_span()
    work, event, _ = trace.spans
    assert work["attributes"] == {"a": 1, "b": 2, "c": 3} and (work["start_time"], work["end_time"]) == (5.0, 7.5)
    assert work["status"] == {"status_code": "ERROR", "description": "'gone'"}
    assert [one["name"] for one in work["events"]] == ["exception"]
    assert (event["start_time"], span.start_time, span.attributes) == (3.0, 3.0, {"x": 1})


async def test_a_cancelled_operation_is_an_error() -> None:
    with traced(AttemptTrace("r", "a")) as trace:

        async def work() -> None:
            with lr.operation(name="slow"):
                await asyncio.sleep(10)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert trace.spans[0]["status"]["status_code"] == "ERROR"


def test_a_dummy_gives_spans_back_and_records_none() -> None:
    tracer = lr.DummyTracer()
    with traced(AttemptTrace("r", "a")) as trace:
        assert tracer.create_span("x", {"a": 1}, timestamp=2.0).end_time == 2.0
        with pytest.raises(KeyError), tracer.operation_context("y") as op:
            raise KeyError("z")
    span = op.get_recorded_span()
    assert (span.status.status_code, span.attributes["exception.type"]) == ("ERROR", "KeyError")
    assert trace.spans == []
    with pytest.raises(ValueError, match="has not ended"), tracer.operation_context("y") as op:
        op.get_recorded_span()


def test_a_tracer_of_the_users_own_gets_what_is_emitted() -> None:
    class Mine(lr.DummyTracer):
        made: list[str]

        def create_span(self, name: str, *args: Any, **kwargs: Any) -> lr.SpanCoreFields:
            self.made.append(name)
            return super().create_span(name, *args, **kwargs)

    mine = Mine()
    mine.made = []
    lr.set_active_tracer(mine)
    try:
        assert lr.get_active_tracer() is mine
        lr.emit_reward(1.0)
        with pytest.raises(ValueError, match="Mine is active here already"):
            lr.set_active_tracer(mine)
        with traced(AttemptTrace("r", "a")) as trace:
            assert lr.get_active_tracer() is not mine
            lr.emit_message("x")
    finally:
        lr.clear_active_tracer()
    assert mine.made == ["agentlightning.annotation"] and len(trace.spans) == 1
    assert lr.get_active_tracer() is None


def test_the_base_says_what_is_missing() -> None:
    tracer = lr.Tracer()
    assert tracer.get_langchain_handler() is None
    for call in (tracer.get_last_trace, tracer.trace_context, lambda: tracer.create_span("x")):
        with pytest.raises(NotImplementedError, match="Tracer does not define"):
            call()
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(lr.OtelTracer())), lr.OtelTracer)
