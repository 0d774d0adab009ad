"""Functions and blocks of an agent as spans, which become the parents of what happens in them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from types import TracebackType
from typing import Any, TypeVar, cast, overload

from lightning_ray.emitter.recorder import recorder
from lightning_ray.emitter.stepping import in_context
from lightning_ray.otel import flatten_attributes, sanitize_attribute_value, sanitize_attributes
from lightning_ray.semconv import AGL_OPERATION, LightningSpanAttributes
from lightning_ray.span import SpanCoreFields
from lightning_ray.tracing.recording import SpanRecordingContext
from lightning_ray.tracing.tracer import DummyTracer, get_active_tracer

F = TypeVar("F", bound=Callable[..., Any])
NAME = LightningSpanAttributes.OPERATION_NAME.value
INPUT = LightningSpanAttributes.OPERATION_INPUT.value
OUTPUT = LightningSpanAttributes.OPERATION_OUTPUT.value
MAX_ITEMS = 1000
"""Items of a generator that are recorded as its output."""
_NOWHERE = DummyTracer()


@overload
def operation(fn: F, *, propagate: bool = True, name: str | None = None, **additional_attributes: Any) -> F: ...


@overload
def operation(
    fn: None = None, *, propagate: bool = True, name: str | None = None, **additional_attributes: Any
) -> OperationContext: ...


def operation(
    fn: Callable[..., Any] | None = None,
    *,
    propagate: bool = True,
    name: str | None = None,
    **additional_attributes: Any,
) -> Any:
    """A span around a function (``@operation``, ``@operation(kind="tool")``) or a block (``with operation() as op``).

    A function's arguments and result are recorded; of a block, what ``op.set_input`` and ``op.set_output`` say.
    Outside of a rollout a function runs untraced; a block raises RuntimeError.
    """
    if name is not None:
        if NAME in additional_attributes:
            raise ValueError(f"name={name!r} and {NAME}={additional_attributes[NAME]!r} say the same: give one of them")
        additional_attributes[NAME] = name
    if fn is not None and not callable(fn):
        raise ValueError(f"operation() takes a function, got {type(fn).__name__} {fn!r:.80}; a name goes to name=")
    context = OperationContext(AGL_OPERATION, additional_attributes, propagate)
    return context if fn is None else context(fn)


class OperationContext:
    """One block, or every call of one function, as a span."""

    def __init__(self, name: str, attributes: Mapping[str, Any], propagate: bool = True):
        self.name = name
        self.initial_attributes = sanitize_attributes(flatten_attributes(attributes))
        self.propagate = propagate
        self._entered: AbstractContextManager[SpanRecordingContext] | None = None
        self._recording: SpanRecordingContext | None = None
        self._span: SpanCoreFields | None = None

    def __enter__(self) -> OperationContext:
        tracer = recorder("the operation", self.propagate)
        self._entered = tracer.operation_context(self.name, attributes=self.initial_attributes)
        self._recording = self._entered.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        entered, recording = self._entered, self._recording
        self._entered = self._recording = None
        if entered is not None:
            entered.__exit__(kind, error, stack)
        if recording is not None:
            self._span = recording.get_recorded_span()

    def span(self) -> SpanCoreFields:
        """The span of the block. Raises RuntimeError before the block has ended."""
        if self._span is None:
            raise RuntimeError("the operation has not ended: ask for its span after the block")
        return self._span

    def set_input(self, *args: Any, **kwargs: Any) -> None:
        """Record what the block works on. Raises RuntimeError outside of the block."""
        self._within("set_input").record_attributes({**_nested(f"{INPUT}.args", list(args)), **_nested(INPUT, kwargs)})

    def set_output(self, output: Any) -> None:
        """Record what the block came to. Raises RuntimeError outside of the block."""
        self._within("set_output").record_attributes(_nested(OUTPUT, output))

    def _within(self, method: str) -> SpanRecordingContext:
        if self._recording is None:
            raise RuntimeError(f"{method}() belongs inside the block: with operation() as op: op.{method}(...)")
        return self._recording

    def __call__(self, fn: F) -> F:
        """The function, traced whenever it is called inside of a rollout."""
        if inspect.isasyncgenfunction(fn):
            wrap = _iterating_async
        elif inspect.isgeneratorfunction(fn):
            wrap = _iterating
        elif inspect.iscoroutinefunction(fn):
            wrap = _running_async
        else:
            wrap = _running
        return cast(F, functools.wraps(fn)(wrap(_Calls(self, fn))))


class _Calls:
    """What the calls of one traced function have in common."""

    def __init__(self, context: OperationContext, fn: Callable[..., Any]):
        self.fn = fn
        self.name = context.name
        self.attributes = {NAME: getattr(fn, "__name__", type(fn).__name__), **context.initial_attributes}
        self.propagate = context.propagate
        self.signature = inspect.signature(fn)

    def begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[SpanRecordingContext]:
        """The span of one call."""
        tracer = get_active_tracer() if self.propagate else None
        if tracer is None:
            return _NOWHERE.operation_context(self.name)
        return tracer.operation_context(self.name, attributes={**self.attributes, **self._inputs(args, kwargs)})

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:
            return {**_nested(f"{INPUT}.args", list(args)), **_nested(f"{INPUT}.kwargs", kwargs)}
        bound.apply_defaults()
        inputs: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if name != "self":
                inputs.update(_nested(f"{INPUT}.{name}", value))
        return inputs


def _running(calls: _Calls) -> Callable[..., Any]:
    def running(*args: Any, **kwargs: Any) -> Any:
        with calls.begun(args, kwargs) as recording:
            result = calls.fn(*args, **kwargs)
            recording.record_attributes(_nested(OUTPUT, result))
            return result

    return running


def _running_async(calls: _Calls) -> Callable[..., Any]:
    async def running(*args: Any, **kwargs: Any) -> Any:
        with calls.begun(args, kwargs) as recording:
            result = await calls.fn(*args, **kwargs)
            recording.record_attributes(_nested(OUTPUT, result))
            return result

    return running


def _iterating(calls: _Calls) -> Callable[..., Any]:
    """The generator's own steps happen under the span, what its consumer does between them does not."""

    def iterating(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with _Inside(calls.begun(args, kwargs)) as inside:
            generator = calls.fn(*args, **kwargs)
            try:
                given, step = None, generator.send
                while True:
                    try:
                        item = inside.context.run(step, given)
                    except StopIteration as stop:
                        return stop.value
                    inside.add(item)
                    try:
                        given, step = (yield item), generator.send
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        given, step = error, generator.throw
            finally:
                inside.context.run(generator.close)

    return iterating


def _iterating_async(calls: _Calls) -> Callable[..., Any]:
    """As ``_iterating``."""

    async def iterating(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with _Inside(calls.begun(args, kwargs)) as inside:
            generator = calls.fn(*args, **kwargs)
            try:
                given, step = None, generator.asend
                while True:
                    try:
                        item = await in_context(inside.context, step(given))
                    except StopAsyncIteration:
                        return
                    inside.add(item)
                    try:
                        given, step = (yield item), generator.asend
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        given, step = error, generator.athrow
            finally:
                await in_context(inside.context, generator.aclose())

    return iterating


class _Inside:
    """A span around a generator: current in a context of its own, in which the generator's steps are run."""

    def __init__(self, operation: AbstractContextManager[SpanRecordingContext]):
        self.context: Context = copy_context()
        self._operation = operation
        self._items: list[Any] = []

    def __enter__(self) -> _Inside:
        self._recording = self.context.run(self._operation.__enter__)
        return self

    def add(self, item: Any) -> None:
        """The generator has yielded."""
        if len(self._items) < MAX_ITEMS:
            self._items.append(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._recording.record_attributes(_nested(OUTPUT, self._items))
        if kind is GeneratorExit:  # its consumer has enough: no failure
            kind = error = stack = None
        self.context.run(self._operation.__exit__, kind, error, stack)


def _nested(prefix: str, value: Any) -> dict[str, Any]:
    """A value under a prefix; what cannot be nested is one attribute. Never fails: it is not the agent's business."""
    try:
        return sanitize_attributes(flatten_attributes({prefix: value}))
    except ValueError:
        return {prefix: sanitize_attribute_value(str(value))}
