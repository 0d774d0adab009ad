"""Tracing: every span lands in the attempt in which it began, and in no other, however many run at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry import context as otel
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import lightning_ray as lr
from lightning_ray.store.schema import read_spans, spans_to_batch
from lightning_ray.tracing import AttemptTrace, active_trace, traced
from lightning_ray.tracing import provider as provider_module


@pytest.fixture
def trace() -> AttemptTrace:
    return AttemptTrace("ro-1", "at-1")


def tracer() -> Any:
    return api.get_tracer("framework")


def names(trace: AttemptTrace) -> list[str]:
    return [span["name"] for span in trace.spans]


def by_name(trace: AttemptTrace) -> dict[str, Any]:
    return {span["name"]: span for span in trace.spans}


def test_spans_of_opentelemetry_become_the_attempts(trace: AttemptTrace) -> None:
    before = time.time()
    with traced(trace), tracer().start_as_current_span("outer", attributes={"ids": [1, 2]}) as outer:
        outer.add_event("tick", {"n": 1})
        with tracer().start_as_current_span("inner") as inner:
            inner.set_status(api.StatusCode.ERROR, "broken")
            lr.emit_reward(1.0)
    found = by_name(trace)
    assert names(trace) == ["agentlightning.annotation", "inner", "outer"]
    assert found["agentlightning.annotation"]["parent_id"] == found["inner"]["span_id"]
    assert found["inner"]["parent_id"] == found["outer"]["span_id"] and found["outer"]["parent_id"] is None
    assert {span["trace_id"] for span in trace.spans} == {trace.trace_id}
    assert [span.sequence_id for span in trace.as_spans()] == [1, 2, 3]
    assert found["outer"]["attributes"] == {"ids": [1, 2]} and found["outer"]["events"][0]["name"] == "tick"
    assert found["inner"]["status"] == {"status_code": "ERROR", "description": "broken"}
    assert before <= found["outer"]["start_time"] <= found["inner"]["start_time"] <= found["inner"]["end_time"]
    stored = read_spans(spans_to_batch(trace.spans))
    assert [span.name for span in stored] == names(trace) and stored[2].attributes == {"ids": [1, 2]}
    assert stored[2].events[0].attributes == {"n": 1}


def test_outside_of_an_attempt_nothing_is_recorded(trace: AttemptTrace) -> None:
    with traced(trace):
        pass
    with tracer().start_as_current_span("outside") as span:
        assert not span.is_recording()
    assert trace.spans == [] and not provider_module.live.get(span.get_span_context().span_id)


def test_what_surrounds_an_attempt_is_not_its_parent(trace: AttemptTrace) -> None:
    outer = AttemptTrace("ro-0", "at-0")
    with traced(outer), tracer().start_as_current_span("surrounding"), traced(trace):
        tracer().start_span("x").end()
        lr.emit_message("hello")
    assert [span["parent_id"] for span in trace.spans] == [None, None]
    assert names(outer) == ["surrounding"]


def test_a_new_root_inside_an_attempt_is_still_the_attempts(trace: AttemptTrace) -> None:
    with traced(trace):
        root = tracer().start_span("root", context=otel.Context())
        child = tracer().start_span("child", context=api.set_span_in_context(root, otel.Context()))
    child.end()
    root.end()
    found = by_name(trace)
    assert found["child"]["parent_id"] == found["root"]["span_id"] and found["root"]["parent_id"] is None


def test_a_span_started_elsewhere_goes_to_its_parents_attempt(trace: AttemptTrace) -> None:
    other = AttemptTrace("ro-2", "at-2")
    with traced(trace), tracer().start_as_current_span("parent"):
        handed_over = otel.get_current()
    with traced(other):
        tracer().start_span("child", context=handed_over).end()
    assert "child" in names(trace) and other.spans == []


def test_take_gives_each_span_once(trace: AttemptTrace) -> None:
    with traced(trace):
        lr.emit_message("one")
        running = tracer().start_span("running")
        assert [span["name"] for span in trace.take()] == ["agentlightning.message"]
        assert trace.take() == []
        running.end()
        lr.emit_reward(1.0)
        assert [span["name"] for span in trace.take()] == ["running", "agentlightning.annotation"]
    assert len(trace.spans) == 3


def test_what_is_still_open_ends_with_the_attempt_and_says_so(trace: AttemptTrace) -> None:
    with traced(trace):
        never = tracer().start_span("never", attributes={"a": 1})
        call = trace.begin("call", {"b": 2})
        trace.finish()
        with pytest.raises(RuntimeError, match=r"attempt at-1 of rollout ro-1 has ended: 'agentlightning.message'"):
            lr.emit_message("late")
        tracer().start_span("late").end()
    never.end()
    call.end()
    trace.finish()
    assert [(span["name"], span["attributes"]) for span in trace.spans] == [
        ("never", {"a": 1, "lightning_ray.unfinished": True}),
        ("call", {"b": 2, "lightning_ray.unfinished": True}),
    ]
    assert all(span["end_time"] >= span["start_time"] for span in trace.spans)


def test_more_attributes_than_opentelemetry_keeps_by_default(trace: AttemptTrace) -> None:
    many = {f"key.{index}": index for index in range(500)}
    with traced(trace), lr.operation(**many):
        pass
    assert len(trace.spans[0]["attributes"]) == 500


def test_ids_do_not_repeat_for_an_agent_that_seeds_random(trace: AttemptTrace) -> None:
    import random

    with traced(trace):
        for _ in range(3):
            random.seed(0)
            with lr.operation():
                lr.emit_message("x")
    assert len({span["span_id"] for span in trace.spans}) == 6


async def test_many_attempts_at_once_in_tasks_and_threads() -> None:
    """200 attempts interleave at every await, with threads of a shared pool and of their own."""
    pool = ThreadPoolExecutor(8)
    loop = asyncio.get_running_loop()

    def in_thread(mark: str) -> None:
        with tracer().start_as_current_span("thread", attributes={"mark": mark}):
            time.sleep(0.001)
            lr.emit_annotation({"mark": mark})

    @lr.operation
    async def tool(mark: str) -> str:
        await asyncio.sleep(0)
        lr.emit_annotation({"mark": mark})
        return mark

    async def part(mark: str) -> None:
        for _ in range(3):
            with tracer().start_as_current_span("part", attributes={"mark": mark}):
                await asyncio.sleep(0.0005)
                assert await tool(mark) == mark

    async def attempt(index: int) -> AttemptTrace:
        mark = f"mark-{index}"
        trace = AttemptTrace(f"ro-{index}", f"at-{index}")
        with traced(trace):
            thread = threading.Thread(target=in_thread, args=(mark,))
            thread.start()
            await asyncio.gather(
                part(mark),
                part(mark),
                loop.run_in_executor(pool, in_thread, mark),
                asyncio.to_thread(in_thread, mark),
            )
            await asyncio.to_thread(thread.join)
            lr.emit_reward(float(index))
        trace.finish()
        return trace

    traces = await asyncio.gather(*(attempt(index) for index in range(200)))
    for index, trace in enumerate(traces):
        ids = {span["span_id"]: span for span in trace.spans}
        marks = [
            span["attributes"].get("mark") or span["attributes"].get("agentlightning.operation.input.mark")
            for span in trace.spans
        ]
        assert marks[:-1] == [f"mark-{index}"] * (3 * 2 + 6 * 3)
        assert trace.spans[-1]["attributes"]["agentlightning.reward.0.value"] == index
        assert {span["rollout_id"] for span in trace.spans} == {f"ro-{index}"}
        for span in trace.spans:
            if span["name"] == "agentlightning.annotation" and span is not trace.spans[-1]:
                assert ids[span["parent_id"]]["name"] in ("thread", "agentlightning.operation")
    pool.shutdown()


def test_a_pools_thread_does_not_stay_with_the_attempt_that_started_it(trace: AttemptTrace) -> None:
    with ThreadPoolExecutor(1) as pool:
        with traced(trace):
            assert pool.submit(active_trace).result() is trace
        with pytest.raises(RuntimeError, match="nothing is being traced"):
            pool.submit(active_trace).result()


def test_a_daemon_thread_is_left_alone(trace: AttemptTrace) -> None:
    found: list[bool] = []
    with traced(trace):
        thread = threading.Thread(target=lambda: found.append(lr.get_active_tracer() is None), daemon=True)
        thread.start()
        thread.join()
    assert found == [True]


def test_threads_record_in_one_attempt_without_losing_any(trace: AttemptTrace) -> None:
    with traced(trace), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: lr.emit_annotation({"index": index}), range(500)))
    assert sorted(span["attributes"]["index"] for span in trace.spans) == list(range(500))
    assert len(trace.as_spans()) == len({span["span_id"] for span in trace.spans}) == 500


def test_a_provider_of_the_agents_own_is_seen_and_keeps_its_exporter(trace: AttemptTrace) -> None:
    exporter = InMemorySpanExporter()
    with traced(trace):
        own = TracerProvider(shutdown_on_exit=False)
        own.add_span_processor(SimpleSpanProcessor(exporter))
        with own.get_tracer("agent").start_as_current_span("own"):
            lr.emit_reward(1.0)
    assert names(trace) == ["agentlightning.annotation", "own"]
    assert [span.name for span in exporter.get_finished_spans()] == ["own"]
    own.get_tracer("agent").start_span("outside").end()
    assert len(trace.spans) == 2 and len(exporter.get_finished_spans()) == 2


PROVIDERS = """
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from lightning_ray.tracing import AttemptTrace, traced
import lightning_ray as lr

trace = AttemptTrace("r", "a")
{before}
with traced(trace):
    {inside}
    with api.get_tracer("late").start_as_current_span("late"):
        with lr.operation():
            lr.emit_reward(1.0)
print(type(api.get_tracer_provider()).__name__, [span["name"].split(".")[-1] for span in trace.spans])
"""


@pytest.mark.parametrize(
    ("before", "inside", "expected"),
    [
        ("", "", "['annotation', 'operation', 'late']"),
        ("api.set_tracer_provider(TracerProvider())", "", "['annotation', 'operation', 'late']"),
        ("", "api.set_tracer_provider(TracerProvider())", "['annotation', 'operation', 'late']"),
        ("api.set_tracer_provider(TracerProvider(sampler=ALWAYS_OFF))", "", "['annotation', 'operation']"),
    ],
    ids=["none", "before", "inside", "sampled-out"],
)
def test_whoever_sets_the_processs_provider(before: str, inside: str, expected: str) -> None:
    code = textwrap.dedent(PROVIDERS).format(before=before, inside=inside or "pass")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"TracerProvider {expected}" and "not allowed" not in done.stderr
