"""Spans into triplets and messages: which calls count, whose they are, and which reward is theirs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

import lightning_ray as lr
from lightning_ray.adapters.tree import TraceTree

FIRST, OCCURRENCE = lr.RewardMatchPolicy.FIRST_SIBLING, lr.RewardMatchPolicy.FIRST_OCCURRENCE
_numbers = itertools.count(1)


def span(span_id: str, parent: str | None, start: float, end: float, name: str = "x", **attributes: Any) -> lr.Span:
    dotted = {key.replace("__", "."): value for key, value in attributes.items()}
    made = lr.Span.from_attributes(
        attributes=dotted, name=name, span_id=span_id, parent_id=parent, start_time=start, end_time=end
    )
    return made.model_copy(update={"sequence_id": next(_numbers)})


def call(span_id: str, parent: str | None, start: float, end: float | None = None, **attributes: Any) -> lr.Span:
    attributes = {"gen_ai__response__id": f"r-{span_id}", **attributes}
    attributes.setdefault("prompt_token_ids", [1])
    attributes.setdefault("response_token_ids", [int(start)])
    return span(span_id, parent, start, start + 0.5 if end is None else end, "openai.chat.completion", **attributes)


def reward(span_id: str, parent: str | None, at: float, value: float) -> lr.Span:
    core = lr.emit_reward(value, propagate=False)
    made = span(span_id, parent, at, at, core.name)
    return made.model_copy(update={"attributes": core.attributes})


def told(triplets: list[lr.Triplet]) -> list[tuple[list[int], float | None, str]]:
    return [(one.response["token_ids"], one.reward, one.metadata["agent_name"]) for one in triplets]


def test_calls_in_order_with_the_reward_that_followed() -> None:
    spans = [call("b", None, 3), call("a", None, 1), reward("x", None, 2, 0.5), reward("y", None, 4, 1.0)]
    assert told(lr.TracerTraceToTriplet()(spans)) == [([1], 0.5, "*"), ([3], 1.0, "*")]
    assert lr.TracerTraceToTriplet().adapt([]) == []


def test_a_reward_goes_to_the_latest_call_that_has_ended_without_one() -> None:
    spans = [call("a", None, 1), call("b", None, 2, end=9), reward("x", None, 3, 0.5), reward("y", None, 10, 1.0)]
    assert [one.reward for one in lr.TracerTraceToTriplet().adapt(spans)] == [0.5, 1.0]


def test_a_reward_among_siblings() -> None:
    spans = [
        span("p", None, 0, 5, "agent"),
        call("a", "p", 1),
        reward("x", "p", 2, 0.5),
        call("b", None, 3),
        reward("y", "p", 4, 1.0),
    ]
    assert [one.reward for one in lr.TracerTraceToTriplet(repair_hierarchy=False).adapt(spans)] == [0.5, 1.0]
    siblings = lr.TracerTraceToTriplet(repair_hierarchy=False, reward_match=FIRST)
    assert [one.reward for one in siblings.adapt(spans)] == [0.5, None]
    assert lr.TracerTraceToTriplet(reward_match="first_sibling").reward_match is FIRST  # type: ignore[arg-type]


AGENTS = [
    span("root", None, 0, 20, "run"),
    span("w", "root", 1, 9, "agent", agent__name="writer"),
    call("a", "w", 2),
    span("c", "w", 3, 8, "agent", agent__name="critic"),
    call("b", "c", 4),
    call("d", "w", 8.1, 8.5),
    call("e", "root", 10),
]


def test_the_innermost_agent_decides() -> None:
    assert [name for _, _, name in told(lr.TracerTraceToTriplet().adapt(AGENTS))] == ["writer", "critic", "writer", "*"]
    assert told(lr.TracerTraceToTriplet(agent_match="writ").adapt(AGENTS)) == [
        ([2], None, "writer"),
        ([8], None, "writer"),
    ]
    assert told(lr.TracerTraceToTriplet(agent_match="^critic$").adapt(AGENTS)) == [([4], None, "critic")]
    assert lr.TracerTraceToTriplet(agent_match="nobody").adapt(AGENTS) == []


def test_a_call_says_itself_who_made_it() -> None:
    spans = [call("a", None, 1, gen_ai__agent__name="writer"), call("b", None, 2)]
    assert told(lr.TracerTraceToTriplet(agent_match="writer").adapt(spans)) == [([1], None, "writer")]


def test_a_call_that_floats_is_put_under_the_agent_around_it() -> None:
    spans = [
        span("w", None, 1, 9, "agent", agent__name="writer"),
        span("c", "w", 3, 8, "agent", agent__name="critic"),
        call("a", None, 4),
        call("b", None, 10),
    ]
    match = lr.TracerTraceToTriplet(agent_match="critic")
    assert told(match.adapt(spans)) == [([4], None, "critic")]
    assert lr.TracerTraceToTriplet(agent_match="critic", repair_hierarchy=False).adapt(spans) == []


def test_a_call_seen_by_two_tracers_is_one() -> None:
    client = call("a", "w", 2, prompt_token_ids=None, response_token_ids=None, gen_ai__completion__0__content="hi")
    server = call("s", None, 2, 2.4, gen_ai__response__id="r-a", response_token_ids=[7])
    agent = span("w", None, 1, 9, "agent", agent__name="writer")
    for spans in ([agent, client, server], [server, agent, client]):
        client.attributes = {key: value for key, value in client.attributes.items() if value is not None}
        [one] = lr.TracerTraceToTriplet(repair_hierarchy=False, agent_match="writer").adapt(spans)
        assert one.response == {"token_ids": [7], "raw_content": [{"content": "hi"}]}
        assert one.metadata["agent_name"] == "writer"


def test_a_nested_call_without_an_id_is_the_same_call() -> None:
    spans = [call("a", None, 1, 5), span("b", "a", 2, 3, "openai.chat.completion")]
    assert len(lr.TracerTraceToTriplet().adapt(spans)) == 1


def test_calls_that_compute_a_reward_are_left_out() -> None:
    judge = span("j", None, 1, 5, "agentlightning.operation", agentlightning__operation__name="agentlightning.reward")
    spans = [judge, call("a", "j", 2), call("b", None, 6)]
    assert [one.response["token_ids"] for one in lr.TracerTraceToTriplet().adapt(spans)] == [[6]]
    kept = lr.TracerTraceToTriplet(exclude_llm_call_in_reward=False).adapt(spans)
    assert [one.response["token_ids"] for one in kept] == [[2], [6]]


def test_calls_without_tokens_may_be_skipped() -> None:
    spans = [call("a", None, 1, response_token_ids=[]), call("b", None, 2)]
    assert len(lr.TracerTraceToTriplet().adapt(spans)) == 2
    assert len(lr.TracerTraceToTriplet(_skip_empty_token_spans=True).adapt(spans)) == 1
    other = lr.TracerTraceToTriplet(llm_call_match="raw_call")
    assert other.adapt(spans) == []


def test_what_a_triplet_says() -> None:
    image = json.dumps([{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:x"}}])
    one = call(
        "a",
        None,
        1,
        gen_ai__request__model="m",
        gen_ai__prompt__0__role="user",
        gen_ai__prompt__0__content=image,
        gen_ai__completion__0__content="hi",
        logprobs__content='[{"logprob": -0.5}]',
    )
    [triplet] = lr.TracerTraceToTriplet().adapt([one])
    assert triplet.prompt == {
        "token_ids": [1],
        "raw_content": [{"role": "user", "content": image}],
        "image_urls": ["data:x"],
    }
    assert triplet.response["logprobs"] == [{"logprob": -0.5}]
    assert triplet.metadata == {
        "request": {"model": "m"},
        "response": {"id": "r-a"},
        "response_id": "r-a",
        "agent_name": "*",
    }


def test_spans_of_opentelemetry_and_captured_calls_are_read_too() -> None:
    otel: Any = TracerProvider(shutdown_on_exit=False).get_tracer("t").start_span("openai.chat.completion")
    otel.set_attribute("response_token_ids", [9])
    otel.end()
    assert lr.TracerTraceToTriplet().adapt([otel])[0].response["token_ids"] == [9]
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    captured = span("a", None, 1, 2, "openai.chat.completion", request=request).model_copy()
    captured = lr.Span.model_validate(
        {**captured.model_dump(), "agent": "writer", "prompt_ids": [1, 2], "sampled_ids": [3]}
    )
    [triplet] = lr.TracerTraceToTriplet(agent_match="writer").adapt([captured])
    assert triplet.prompt["token_ids"] == [1, 2] and triplet.response["token_ids"] == [3]
    assert triplet.prompt["raw_content"] == [{"role": "user", "content": "hi"}]


def test_a_tree_of_broken_parents() -> None:
    lost = TraceTree.from_spans([span("a", "gone", 1, 2), span("b", "gone", 3, 4), span("c", "b", 3, 4)])
    assert lost.id == "gone" and [node.id for node in lost.traverse()] == ["gone", "a", "b", "c"]
    assert (lost.start_time, lost.end_time, lost.span.name) == (1, 4, "agentlightning.virtual")
    several = TraceTree.from_spans([span("a", None, 1, 2), span("b", "gone", 3, 4)])
    assert several.id == "virtual-root" and several.find_id("b") is not None and several.find_id("z") is None
    circle = TraceTree.from_spans([span("a", "b", 1, 2), span("b", "a", 1, 2), span("a", None, 5, 6)])
    assert sorted(node.id for node in circle.traverse()) == ["a", "b"]
    assert TraceTree.from_spans(AGENTS).names_tuple()[1][0][0] == "agent [writer]"
    assert json.dumps(lost.to_json()) and "gone" in repr(lost)
    with pytest.raises(ValueError, match="no spans"):
        TraceTree.from_spans([])


def test_a_deep_trace_is_no_problem() -> None:
    deep = [span("0", None, 0, 9)] + [span(str(i), str(i - 1), 0, 9) for i in range(1, 5000)]
    assert len(lr.TracerTraceToTriplet(repair_hierarchy=False).adapt([*deep, call("c", "4999", 1)])) == 1


def test_spans_of_a_proxy_by_their_sequence() -> None:
    def raw(sequence: int, **attributes: Any) -> lr.Span:
        return span(f"p{sequence}", None, 0, 0, "raw_gen_ai_request", **attributes).model_copy(
            update={"sequence_id": sequence}
        )

    first = raw(
        1,
        llm__hosted_vllm__prompt_token_ids="[1, 2]",
        llm__hosted_vllm__response_token_ids="[[3], [4]]",
        llm__hosted_vllm__id="r-1",
    )
    again = first.model_copy(update={"sequence_id": 2, "span_id": "again"})
    second = raw(3, llm__hosted_vllm__prompt_token_ids="[1]", llm__hosted_vllm__choices="[{'token_ids': [5]}]")
    none = raw(4, llm__hosted_vllm__prompt_token_ids="nonsense(")
    request = span("q", None, 0, 0, "litellm_request", prompt_token_ids=[6], response_token_ids=[7])
    request.sequence_id = 6
    middle, last = reward("x", None, 0, 0.5), reward("y", None, 0, 1.0)
    middle.sequence_id, last.sequence_id = 5, 9
    triplets = lr.LlmProxyTraceToTriplet().adapt([last, request, none, second, again, first, middle])
    assert [(one.prompt["token_ids"], one.response["token_ids"], one.reward) for one in triplets] == [
        ([1, 2], [3], None),
        ([1], [5], 0.5),
        ([6], [7], 1.0),
    ]
    assert triplets[0].metadata == {"response_id": "r-1"}


def test_messages_with_tools() -> None:
    completion = span(
        "a",
        None,
        1,
        2,
        "openai.chat.completion",
        **{
            "gen_ai.prompt.0.role": "user",
            "gen_ai.prompt.0.content": "look",
            "gen_ai.prompt.1.role": "assistant",
            "gen_ai.prompt.1.tool_calls.0.id": "c-0",
            "gen_ai.prompt.1.tool_calls.0.name": "look",
            "gen_ai.prompt.1.tool_calls.0.arguments": "{}",
            "gen_ai.prompt.2.role": "tool",
            "gen_ai.prompt.2.content": "seen",
            "gen_ai.prompt.2.tool_call_id": "c-0",
            "gen_ai.prompt.prompt_filter_results": "whatever",
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": "ok",
            "gen_ai.completion.0.finish_reason": "stop",
            "gen_ai.request.functions.0.name": "look",
            "gen_ai.request.functions.0.parameters": '{"type": "object"}',
        },
    )
    tool = span("t", "a", 3, 4, "tool", tool__name="look", tool__parameters="{}", tool__call__id="c-1")
    [conversation] = lr.TraceToMessages().adapt([completion, tool, reward("r", None, 5, 1.0)])
    called = {"id": "c-0", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    assert conversation["messages"] == [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": "seen", "tool_call_id": "c-0"},
        {"role": "assistant", "content": "ok", "tool_calls": [{**called, "id": "c-1"}]},
    ]
    assert conversation["tools"] == [
        {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}
    ]
    assert lr.TraceToMessages()([reward("r", None, 5, 1.0)]) == []


def test_messages_of_a_call_seen_by_two_tracers() -> None:
    client = call("a", None, 1, gen_ai__completion__0__content="hi")
    request = {"messages": [{"role": "user", "content": "hello"}]}
    server = call("s", None, 1, gen_ai__response__id="r-a", request=request)
    for spans in ([client, server], [server, client]):
        [conversation] = lr.TraceToMessages().adapt(spans)
        assert conversation["messages"] == [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
        ]


def test_an_adapter_is_what_adapts() -> None:
    class Count(lr.TraceAdapter[int]):
        def adapt(self, source: Any, /) -> int:
            return len(source)

    assert Count()([]) == 0 and issubclass(lr.TracerTraceToTriplet, lr.TraceToTripletBase)
    with pytest.raises(NotImplementedError, match="Adapter does not define adapt"):
        lr.Adapter[Any, Any]()(1)
