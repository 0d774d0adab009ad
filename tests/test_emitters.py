"""Every emitter and its reader: what is recorded, what is given back, and what is refused."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

import lightning_ray as lr
from lightning_ray.otel import make_link_attributes, make_tag_attributes
from lightning_ray.tracing import AttemptTrace, traced


@pytest.fixture
def trace() -> Iterator[AttemptTrace]:
    with traced(AttemptTrace("ro-1", "at-1")) as trace:
        yield trace


EMIT: list[Callable[..., lr.SpanCoreFields]] = [
    lambda **kw: lr.emit_reward(1.0, **kw),
    lambda **kw: lr.emit_annotation({"a": 1}, **kw),
    lambda **kw: lr.emit_message("hi", **kw),
    lambda **kw: lr.emit_object({"a": [1]}, **kw),
    lambda **kw: lr.emit_exception(KeyError("x"), **kw),
]


@pytest.mark.parametrize("emit", EMIT)
def test_a_span_is_given_back_and_recorded_unless_told_not_to(emit: Any, trace: AttemptTrace) -> None:
    span = emit()
    assert [(row["name"], row["attributes"]) for row in trace.spans] == [(span.name, span.attributes)]
    assert emit(propagate=False).name == span.name and len(trace.spans) == 1


@pytest.mark.parametrize("emit", EMIT)
def test_outside_of_a_rollout_only_what_is_not_propagated(emit: Any) -> None:
    with pytest.raises(RuntimeError, match=r"nothing is being traced here, so the .* would be lost"):
        emit()
    assert emit(propagate=False).name.startswith("agentlightning.")


def test_more_attributes_ride_along(trace: AttemptTrace) -> None:
    more = {"why": {"a": 1}, "none": None}
    for span in (lr.emit_message("x", more), lr.emit_object(1, more), lr.emit_exception(ValueError(), more)):
        assert span.attributes["why.a"] == 1 and span.attributes["none"] == "null"
    tagged = lr.emit_reward(0.5, attributes={**make_tag_attributes(["t"]), **make_link_attributes({"span_id": "s"})})
    assert tagged.attributes["agentlightning.tag.0"] == "t"
    assert tagged.attributes["agentlightning.link.0.value_match"] == "s"


def test_a_message_is_text(trace: AttemptTrace) -> None:
    assert lr.get_message_value(lr.emit_message("hello")) == "hello"
    assert lr.get_message_value(lr.emit_reward(1.0)) is None
    with pytest.raises(TypeError, match="a message is text, got list"):
        lr.emit_message(["x"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is int 3"):
        lr.get_message_value(lr.SpanCoreFields(name="x", attributes={"agentlightning.message.body": 3}))


@pytest.mark.parametrize("value", ["x", 3, -0.25, True, False, b"\x00\xff", None, [1, "a"], {"a": {"b": []}}])
def test_an_object_comes_back(value: Any, trace: AttemptTrace) -> None:
    span = lr.emit_object(value)
    assert lr.get_object_value(span) == value and type(lr.get_object_value(span)) is type(value)
    assert lr.get_object_value(lr.Span.model_validate(trace.spans[0])) == value


def test_an_object_that_json_cannot_express_is_refused(trace: AttemptTrace) -> None:
    with pytest.raises(RuntimeError, match=r"type test_emitters\.\w+.*cannot be emitted|type .*cannot be emitted"):
        lr.emit_object(trace)
    assert lr.get_object_value(lr.emit_reward(1.0)) is None

    def span(**attributes: Any) -> lr.SpanCoreFields:
        return lr.SpanCoreFields(
            name="x", attributes={f"agentlightning.object.{key}": value for key, value in attributes.items()}
        )

    with pytest.raises(RuntimeError, match="is no JSON"):
        lr.get_object_value(span(json="{"))
    with pytest.raises(RuntimeError, match="is 'complex'; a literal is one of"):
        lr.get_object_value(span(type="complex", literal="1j"))


def test_only_exceptions_are_emitted_as_such(trace: AttemptTrace) -> None:
    with pytest.raises(TypeError, match="an exception is emitted, got str 'oops'"):
        lr.emit_exception("oops")  # type: ignore[arg-type]


def test_rewards_are_found_again(trace: AttemptTrace) -> None:
    first = lr.emit_reward({"a": 1, "b": np.float32(0.5)}, primary_key="b")
    message = lr.emit_message("x")
    last = lr.emit_reward(0.0)
    assert [(one.name, one.value) for one in lr.get_rewards_from_span(first)] == [("b", 0.5), ("a", 1.0)]
    assert (lr.get_reward_value(first), lr.get_reward_value(message), lr.get_reward_value(last)) == (0.5, None, 0.0)
    assert lr.find_reward_spans([first, message, last]) == [first, last] and not lr.is_reward_span(message)
    assert lr.find_final_reward([first, last, message]) == 0.0 and lr.find_final_reward([message]) is None
    assert lr.get_rewards_from_span(message) == []


@pytest.mark.parametrize(
    ("name", "attributes", "value"),
    [
        ("agentlightning.annotation", {"reward": 0.5}, 0.5),
        ("agentlightning.annotation", {"reward": None}, None),
        ("other", {"reward": 0.5}, None),
        ("x", {"agentops.task.output": '{"type": "reward", "value": 1}'}, 1.0),
        ("x", {"agentops.entity.output": {"type": "reward", "value": None}}, None),
        ("x", {"agentops.entity.output": "no json"}, None),
    ],
)
def test_rewards_of_older_versions_are_read(name: str, attributes: Any, value: float | None) -> None:
    assert lr.get_reward_value(lr.SpanCoreFields(name=name, attributes=attributes)) == value


async def test_the_deprecated_decorator_emits_what_is_returned(trace: AttemptTrace) -> None:
    with pytest.warns(DeprecationWarning, match="emit_reward"):

        @lr.reward
        def plain(value: Any) -> Any:
            return value

    with pytest.warns(DeprecationWarning):

        @lr.reward
        async def later(value: Any) -> Any:
            return value

    assert (plain(1), plain(None), await later(0.5)) == (1, None, 0.5)
    assert [span["attributes"]["agentlightning.reward.0.value"] for span in trace.spans] == [1.0, 0.5]


def attributes_of(trace: AttemptTrace) -> dict[str, Any]:
    prefix = "agentlightning.operation."
    return {key.removeprefix(prefix): value for key, value in trace.spans[-1]["attributes"].items()}


def test_an_operation_records_a_functions_arguments_and_result(trace: AttemptTrace) -> None:
    @lr.operation
    def add(a: int, *rest: Any, b: Any = None, **more: Any) -> dict[str, Any]:
        """Docs."""
        return {"sum": a, "list": [1, 2]}

    @lr.operation(kind="tool", name="named")
    def other() -> None: ...

    assert add(1, {"x": 1}, "y", c=2.5)["sum"] == 1
    assert attributes_of(trace) == {
        "name": "add",
        "input.a": 1,
        "input.rest.0.x": 1,
        "input.rest.1": "y",
        "input.b": "null",
        "input.more.c": 2.5,
        "output.sum": 1,
        "output.list": [1, 2],
    }
    assert (add.__name__, add.__doc__) == ("add", "Docs.") and next(iter(inspect.signature(add).parameters)) == "a"
    other()
    assert attributes_of(trace) == {"name": "named", "kind": "tool", "output": "null"}
    with pytest.raises(TypeError):
        add()  # type: ignore[call-arg]
    assert trace.spans[-1]["status"]["status_code"] == "ERROR"


def test_an_operation_never_fails_by_what_it_records(trace: AttemptTrace) -> None:
    @lr.operation
    def odd(given: Any) -> Any:
        return {1: "a key that is no string"}

    assert odd({2: 3}) == {1: "a key that is no string"}
    assert attributes_of(trace)["input.given"] == "{2: 3}"
    assert odd(object()) and "<object" in attributes_of(trace)["input.given"]


async def test_an_operation_on_methods_and_coroutines(trace: AttemptTrace) -> None:
    class Tools:
        @lr.operation
        def look(self, what: str) -> str:
            return what

        @lr.operation
        async def fetch(self, what: str) -> str:
            await asyncio.sleep(0)
            lr.emit_message("inside")
            return what

    assert inspect.iscoroutinefunction(Tools.fetch)
    assert Tools().look("x") == "x" and attributes_of(trace)["input.what"] == "x"
    assert await Tools().fetch("y") == "y"
    message, fetch = trace.spans[-2:]
    assert message["parent_id"] == fetch["span_id"] and fetch["attributes"]["agentlightning.operation.output"] == "y"
    assert "agentlightning.operation.input.self" not in fetch["attributes"]


def test_a_generator_is_one_operation_and_its_consumer_is_not_in_it(trace: AttemptTrace) -> None:
    @lr.operation
    def count(n: int) -> Iterator[Any]:
        for index in range(n):
            lr.emit_message("inside")
            got = yield index
            if got:
                return got

    items = []
    for item in count(2):
        lr.emit_message("outside")
        items.append(item)
    rows = trace.spans
    operation = rows[-1]
    inside = [row for row in rows if row["attributes"].get("agentlightning.message.body") == "inside"]
    outside = [row for row in rows if row["attributes"].get("agentlightning.message.body") == "outside"]
    assert items == [0, 1] and {row["parent_id"] for row in inside} == {operation["span_id"]}
    assert {row["parent_id"] for row in outside} == {None}
    assert operation["attributes"]["agentlightning.operation.output"] == [0, 1]
    sent = count(5)
    assert next(sent) == 0
    with pytest.raises(StopIteration, match="enough"):
        sent.send("enough")  # type: ignore[attr-defined]
    given_up = count(5)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert trace.spans[-1]["status"]["status_code"] == "UNSET"
    thrown = count(5)
    next(thrown)
    with pytest.raises(KeyError):
        thrown.throw(KeyError("x"))  # type: ignore[attr-defined]
    assert trace.spans[-1]["status"]["status_code"] == "ERROR"


async def test_an_async_generator_is_one_operation(trace: AttemptTrace) -> None:
    @lr.operation
    async def stream(n: int) -> AsyncIterator[int]:
        for index in range(n):
            await asyncio.sleep(0.001)
            lr.emit_message("inside")
            yield index

    assert inspect.isasyncgenfunction(stream)
    assert [item async for item in stream(3)] == [0, 1, 2]
    operation = trace.spans[-1]
    assert {row["parent_id"] for row in trace.spans[:-1]} == {operation["span_id"]}
    assert operation["attributes"]["agentlightning.operation.output"] == [0, 1, 2]

    @lr.operation
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise KeyError("x")

    with pytest.raises(KeyError):
        [item async for item in failing()]
    assert trace.spans[-1]["status"]["status_code"] == "ERROR"

    async def consume() -> None:
        async for _ in stream(1000):
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled() and trace.spans[-1]["name"] == "agentlightning.operation"


def test_a_block_is_an_operation(trace: AttemptTrace) -> None:
    with lr.operation(user=7, name="block") as op:
        op.set_input("a", {"b": 1}, data=[1, 2])
        lr.emit_reward(1.0)
        op.set_output({"ok": True})
        with pytest.raises(RuntimeError, match="has not ended"):
            op.span()
    assert op.span().attributes == {
        "user": 7,
        "agentlightning.operation.name": "block",
        "agentlightning.operation.input.args.0": "a",
        "agentlightning.operation.input.args.1.b": 1,
        "agentlightning.operation.input.data": [1, 2],
        "agentlightning.operation.output.ok": True,
    }
    assert trace.spans[0]["parent_id"] == trace.spans[1]["span_id"]
    for use in (op.set_input, lambda: op.set_output(1)):
        with pytest.raises(RuntimeError, match="belongs inside the block"):
            use()


def test_what_cannot_be_an_operation() -> None:
    with pytest.raises(ValueError, match="say the same"):
        lr.operation(name="a", **{"agentlightning.operation.name": "b"})
    with pytest.raises(ValueError, match="takes a function, got str 'a name'"):
        lr.operation("a name")  # type: ignore[call-overload]


def test_outside_of_a_rollout_a_function_runs_and_a_block_does_not() -> None:
    @lr.operation
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    with pytest.raises(RuntimeError, match="the operation would be lost"), lr.operation():
        pass
    with lr.operation(propagate=False) as op:
        op.set_output(3)
    assert op.span().attributes == {"agentlightning.operation.output": 3}
