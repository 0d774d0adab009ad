"""The agent at work inside frameworks that do not say it by OpenTelemetry: the real ones where they are installed."""

from __future__ import annotations

import json
import sys
import types
from contextvars import ContextVar
from typing import Any

import openai
import pytest

from lightning_ray.framework_agents import framework_agent_name
from lightning_ray.instrumentation import instrument_openai, uninstrument_openai
from lightning_ray.tracing import AttemptTrace, traced

try:
    import httpx2 as httpx  # the client's own, in newer versions
except ImportError:
    import httpx  # type: ignore[no-redef]


@pytest.fixture
def no_frameworks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("agents.tracing.scope", "langchain_core.runnables.config", "agentscope", "crewai"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return monkeypatch


def test_no_framework_no_name(no_frameworks: pytest.MonkeyPatch) -> None:
    assert framework_agent_name() is None
    no_frameworks.setitem(sys.modules, "agents.tracing.scope", types.ModuleType("another package called agents"))
    assert framework_agent_name() is None


def test_the_innermost_agent_of_the_agents_sdk(no_frameworks: pytest.MonkeyPatch) -> None:
    current: ContextVar[Any] = ContextVar("current")

    def started(kind: str, **data: Any) -> Any:
        span = types.SimpleNamespace(span_data=types.SimpleNamespace(type=kind, **data))
        span._prev_span_token = current.set(span)
        return span

    scope: Any = types.SimpleNamespace(Scope=types.SimpleNamespace(get_current_span=lambda: current.get(None)))
    no_frameworks.setitem(sys.modules, "agents.tracing.scope", scope)
    assert framework_agent_name() is None
    started("task")
    assert framework_agent_name() is None
    started("agent", name="planner")
    started("generation")
    assert framework_agent_name() == "planner"
    started("agent", name="critic")
    assert framework_agent_name() == "critic"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"langgraph_node": "write"}, "write"),
        ({"langgraph_node": "model", "lc_agent_name": "writer"}, "writer"),
        ({}, None),
        (None, None),
    ],
)
def test_the_node_of_a_graph(no_frameworks: pytest.MonkeyPatch, metadata: Any, expected: str | None) -> None:
    config: ContextVar[Any] = ContextVar("config")
    config.set({"metadata": metadata})
    module: Any = types.SimpleNamespace(var_child_runnable_config=config)
    no_frameworks.setitem(sys.modules, "langchain_core.runnables.config", module)
    assert framework_agent_name() == expected


def module_of(name: str, source: str) -> Any:
    """A module with its own globals, as a function on the stack has."""
    module: Any = types.ModuleType(name)
    exec(source, module.__dict__)
    return module


AGENTSCOPE = """
class Agent:
    def __init__(self, name): self.name = name
    def reply(self, model): return self._reasoning(model)
    def _reasoning(self, model): return model()
    async def reply_async(self, model): return await self._reasoning_async(model)
    async def _reasoning_async(self, model): return await model()
"""


async def test_the_innermost_agent_of_agentscope(no_frameworks: pytest.MonkeyPatch) -> None:
    agent = module_of("agentscope.agent._agent", AGENTSCOPE).Agent

    async def model() -> Any:
        return framework_agent_name()

    assert agent("outer").reply(framework_agent_name) is None, "the framework is not loaded"
    no_frameworks.setitem(sys.modules, "agentscope", types.ModuleType("agentscope"))
    assert framework_agent_name() is None
    assert agent("outer").reply(framework_agent_name) == "outer"
    assert agent("outer").reply(lambda: agent("inner").reply(framework_agent_name)) == "inner"
    assert await agent("outer").reply_async(model) == "outer"


def test_whom_a_model_of_crewai_answers(no_frameworks: pytest.MonkeyPatch) -> None:
    source = "def call(request, from_agent=None): return _call(request)\ndef _call(request): return request()"
    call = module_of("crewai.llms.providers.openai.completion", source).call
    no_frameworks.setitem(sys.modules, "crewai", types.ModuleType("crewai"))
    assert call(framework_agent_name) is None
    assert call(framework_agent_name, types.SimpleNamespace(role="planner")) == "planner"
    assert call(framework_agent_name, types.SimpleNamespace(role=None)) is None


ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "done"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


async def test_the_agents_sdk_itself() -> None:
    agents = pytest.importorskip("agents")
    if not hasattr(agents, "Runner"):
        pytest.skip("another package is called agents")
    headers: list[Any] = []

    def answer(request: Any) -> Any:
        headers.append(request.headers.get("x-lightning-agent"))
        content = json.loads(request.content)
        if content.get("tools") and len(headers) == 1:
            name = content["tools"][0]["function"]["name"]
            call = {"id": "c-1", "type": "function", "function": {"name": name, "arguments": "{}"}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            return httpx.Response(200, json={**ANSWER, "choices": [{**ANSWER["choices"][0], "message": message}]})  # type: ignore[index]
        return httpx.Response(200, json=ANSWER)

    agents.set_tracing_disabled(True)
    http: Any = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = openai.AsyncOpenAI(api_key="k", base_url="http://x/v1", http_client=http)
    model = agents.OpenAIChatCompletionsModel(model="m", openai_client=client)
    critic = agents.Agent(name="critic", model=model)
    planner = agents.Agent(name="planner", model=model, handoffs=[critic])
    instrument_openai()
    try:
        with traced(AttemptTrace("r", "a")) as trace:
            result = await agents.Runner.run(planner, "go")
    finally:
        uninstrument_openai()
        agents.set_tracing_disabled(False)
    assert result.last_agent.name == "critic" and headers == ["planner", "critic"]
    assert [span["attributes"]["gen_ai.agent.name"] for span in trace.spans] == ["planner", "critic"]


async def test_langgraph_itself() -> None:
    graphs: Any = pytest.importorskip("langgraph.graph")
    chat: Any = pytest.importorskip("langchain_openai")
    headers: list[Any] = []

    def answer(request: Any) -> Any:
        headers.append(request.headers.get("x-lightning-agent"))
        return httpx.Response(200, json=ANSWER)

    transport: Any = httpx.MockTransport(answer)
    model = chat.ChatOpenAI(
        model="m",
        api_key="k",
        base_url="http://x/v1",
        http_client=httpx.Client(transport=transport),
        http_async_client=httpx.AsyncClient(transport=transport),
    )

    def write(state: Any) -> Any:
        return {"text": model.invoke("go").content}

    async def check(state: Any) -> Any:
        return {"text": (await model.ainvoke("go")).content}

    graph = graphs.StateGraph(dict)
    graph.add_node("write", write)
    graph.add_node("check", check)
    graph.add_edge(graphs.START, "write")
    graph.add_edge("write", "check")
    instrument_openai()
    try:
        with traced(AttemptTrace("r", "a")) as trace:
            await graph.compile().ainvoke({})
    finally:
        uninstrument_openai()
    assert headers == ["write", "check"]
    assert [span["attributes"]["gen_ai.response.id"] for span in trace.spans] == ["chatcmpl-1"] * 2
