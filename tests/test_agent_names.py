"""The name of the agent at work, as each framework says it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace as api

import lightning_ray as lr
from lightning_ray.agent_names import agent_name, current_agent_name, from_header, to_header
from lightning_ray.tracing import AttemptTrace, traced


@pytest.mark.parametrize(
    ("span", "attributes", "expected"),
    [
        ("x", {"agent.name": "planner"}, "planner"),
        ("x", {"gen_ai.agent.name": "planner"}, "planner"),
        ("x", {"recipient_agent_type": "planner"}, "planner"),
        ("x", {"langchain.chain.type": "planner"}, "planner"),
        ("x", {"executor.id": "planner"}, "planner"),
        ("x", {"agentops.span.kind": "agent", "operation.name": "planner"}, "planner"),
        ("x", {"operation.name": "planner"}, None),
        ("x", {"type": "agent", "agentlightning.operation.input.name": "planner"}, "planner"),
        ("langchain.Chain.run", {"lc_name": "planner"}, "planner"),
        ("x", {"lc_name": "planner"}, None),
        ("x", {"agent.name": 3, "executor.id": ""}, None),
    ],
)
def test_a_span_of_an_agent(span: str, attributes: Any, expected: str | None) -> None:
    assert agent_name(span, attributes) == expected


def test_the_innermost_agent_is_at_work() -> None:
    tracer = api.get_tracer("framework")
    with traced(AttemptTrace("r", "a")) as trace:
        assert current_agent_name(trace) is None
        with tracer.start_as_current_span("outer", attributes={"agent.name": "outer"}), lr.operation():
            assert current_agent_name(trace) == "outer"
            with lr.operation(**{"agent.name": "inner"}), tracer.start_as_current_span("step"):
                assert current_agent_name(trace) == "inner"
            assert current_agent_name(trace) == "outer"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_name_fits_a_header(name: str) -> None:
    header = to_header(name)
    assert header.isascii() and "\n" not in header and from_header(header) == name
