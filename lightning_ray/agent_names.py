"""Which agent of several is at work: its name, from the attributes of the spans around it, or from its framework.

The name goes with each model call (header ``x-lightning-agent``), so that one agent of several can be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from lightning_ray.framework_agents import framework_agent_name
from lightning_ray.tracing.attempt import AttemptTrace

AGENT_HEADER = "x-lightning-agent"

_NAMES = (
    "agent.name",  # OpenAI Agents SDK
    "gen_ai.agent.name",  # OpenTelemetry's convention: AutoGen, Microsoft Agent Framework, and others
    "recipient_agent_type",  # AutoGen's teams
    "langchain.chain.type",  # LangGraph
    "executor.id",  # Microsoft Agent Framework's workflows
)
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def agent_name(span_name: str, attributes: Mapping[str, Any]) -> str | None:
    """The agent that a span is of; None if it is no agent's."""
    for key in _NAMES:
        if found := _text(attributes.get(key)):
            return found
    if attributes.get("agentops.span.kind") == "agent" and (found := _text(attributes.get("operation.name"))):
        return found
    if attributes.get("type") == "agent" and (found := _text(attributes.get("agentlightning.operation.input.name"))):
        return found  # Weave
    return _text(attributes.get("lc_name")) if span_name.startswith("langchain.Chain.") else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def current_agent_name(trace: AttemptTrace) -> str | None:
    """The agent at work here: that of the innermost open span around this point that is of one, or the framework's."""
    span = trace.open_span(trace.parent_here())
    while span is not None:
        if (found := agent_name(span.name, span.attributes)) is not None:
            return found
        span = trace.open_span(span.parent_id)
    return framework_agent_name()


def to_header(name: str) -> str:
    """The name as a header's value: anything but printable ASCII is percent-encoded."""
    return quote(name, safe=_PRINTABLE)


def from_header(value: str) -> str:
    """The inverse of ``to_header``."""
    return unquote(value)
