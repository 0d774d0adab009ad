"""The agent at work, from frameworks that keep it in a context variable and not in OpenTelemetry's spans.

Nothing is imported or changed: a framework that is not loaded is not at work. What cannot be read is no name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import Token
from typing import Any


def framework_agent_name() -> str | None:
    """The name of the agent (LangGraph: of the node, unless its agent has a name), if such a framework is at work."""
    for find in _FRAMEWORKS:
        try:
            found = find()
        except (AttributeError, LookupError):
            continue
        if isinstance(found, str) and found:
            return found
    return None


def _openai_agents() -> Any:
    """OpenAI Agents SDK: the innermost span of an agent; each span knows which was the current one before it."""
    module = sys.modules.get("agents.tracing.scope")
    span = module.Scope.get_current_span() if module is not None else None
    while span is not None:
        if span.span_data.type == "agent":
            return span.span_data.name
        before = span._prev_span_token.old_value
        span = None if before is Token.MISSING else before
    return None


def _langgraph() -> Any:
    """LangChain and LangGraph: the configuration of the runnable at work."""
    module = sys.modules.get("langchain_core.runnables.config")
    config = module.var_child_runnable_config.get() if module is not None else None
    metadata = (config or {}).get("metadata") or {}
    return metadata.get("lc_agent_name") or metadata.get("langgraph_node")


_FRAMEWORKS: tuple[Callable[[], Any], ...] = (_openai_agents, _langgraph)
