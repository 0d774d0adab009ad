"""The agent at work, from frameworks that do not say it in OpenTelemetry's spans around a model call.

It is read from their context variables, or where they have none from the calls on the stack, which for a coroutine are
those that await it. Nothing is imported or changed: a framework that is not loaded is not at work. What cannot be read
is no name.
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


def _agentscope() -> Any:
    """AgentScope: the innermost agent on the stack."""
    agent = _on_stack("agentscope", "agentscope.agent.", "self")
    return getattr(agent, "name", None)


def _crewai() -> Any:
    """CrewAI: whom its model is told to answer; an agent has a role for a name."""
    agent = _on_stack("crewai", "crewai.llm", "from_agent")
    return getattr(agent, "role", None)


def _on_stack(framework: str, modules: str, variable: str) -> Any:
    """The value of a local variable, in the innermost call of a function in the framework's modules that has it."""
    frame = sys._getframe() if framework in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(modules) and frame.f_locals.get(variable) is not None:
            return frame.f_locals[variable]
        frame = frame.f_back
    return None


_FRAMEWORKS: tuple[Callable[[], Any], ...] = (_openai_agents, _langgraph, _agentscope, _crewai)
