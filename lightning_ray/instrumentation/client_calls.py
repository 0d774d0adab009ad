"""Calls of a model's client as spans of the attempt that makes them; one seam for the clients of OpenAI and Anthropic.

Every call leaves by ``request`` of a base class, which is wrapped, so that every way in is seen alike: ``create``,
``parse``, ``stream``, raw responses, sync and async, and whatever framework is on top. A call carries the name of the
agent at work in a header. Outside of an attempt nothing is added. What a trained policy sampled is captured at its
server, not here.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_ray.agent_names import AGENT_HEADER, current_agent_name, to_header
from lightning_ray.instrumentation.imports import when_imported
from lightning_ray.otel import format_exception_attributes
from lightning_ray.semconv import MODEL_CALL_NAMES
from lightning_ray.traces import ids as trace_ids
from lightning_ray.traces.ids import TRACE_HEADER
from lightning_ray.tracing.attempt import OpenSpan, current_trace

RAW_HEADER = "x-stainless-raw-response"
"""With it a client marks a request whose response it hands out unparsed; ``stream``: unread, too."""

logger = logging.getLogger(__name__)


class StreamedAnswer(Protocol):
    """Puts a streamed answer together again: ``answer`` is what a call without streaming would have returned so far."""

    answer: dict[str, Any]

    def add(self, chunk: Mapping[str, Any]) -> None:
        """The next chunk."""


@dataclass
class Client:
    """A client's package, the wire APIs it calls by path, and how its requests and answers become attributes."""

    package: str
    apis: Mapping[str, str]
    request_attributes: Callable[[str, Mapping[str, Any], bool], dict[str, Any]]
    response_attributes: Callable[[str, Mapping[str, Any]], dict[str, Any]]
    streamed_answer: Callable[[str], StreamedAnswer]
    _restore: list[Callable[[], None]] = field(default_factory=list)

    def instrument(self, prompts: bool) -> None:
        """Trace its calls in this process, from when it is imported; once is enough."""
        if not self._restore:
            self._restore.append(when_imported(f"{self.package}._base_client", lambda base: self._wrap(base, prompts)))

    def _wrap(self, base: Any, prompts: bool) -> None:
        for client, wrap in ((base.SyncAPIClient, self._sync), (base.AsyncAPIClient, self._async)):
            original = client.request
            client.request = wrap(original, prompts)
            self._restore.append(functools.partial(setattr, client, "request", original))

    def uninstrument(self) -> None:
        """Undo ``instrument``."""
        while self._restore:
            self._restore.pop()()

    def _sync(self, request: Callable[..., Any], prompts: bool) -> Callable[..., Any]:
        @functools.wraps(request)
        def traced_request(client: Any, cast_to: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
            if (call := self._begin(options, prompts)) is None:
                return request(client, cast_to, options, *args, **kwargs)
            try:
                result = request(client, cast_to, options, *args, **kwargs)
            except BaseException as error:
                call.fail(error)
                raise
            if call.raw and hasattr(result, "parse"):
                call.answered_by(result.parse)
            else:
                call.answered(result)
            return result

        return traced_request

    def _async(self, request: Callable[..., Any], prompts: bool) -> Callable[..., Any]:
        @functools.wraps(request)
        async def traced_request(client: Any, cast_to: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
            if (call := self._begin(options, prompts)) is None:
                return await request(client, cast_to, options, *args, **kwargs)
            try:
                result = await request(client, cast_to, options, *args, **kwargs)
            except BaseException as error:
                call.fail(error)
                raise
            if call.raw and hasattr(result, "parse"):
                await call.answered_by_async(result.parse)
            else:
                call.answered(result)
            return result

        return traced_request

    def _begin(self, options: Any, prompts: bool) -> TracedCall | None:
        trace = current_trace()
        if trace is None or trace.ended or options.method != "post" or not isinstance(options.json_data, Mapping):
            return None
        if (api := self.apis.get(options.url.partition("?")[0])) is None:
            return None
        try:
            attributes = self.request_attributes(api, options.json_data, prompts)
        except Exception:  # a request in an unknown shape is the server's to refuse
            logger.warning("a request of %s could not be read for its span", self.package, exc_info=True)
            attributes = {}
        span = trace.begin(MODEL_CALL_NAMES[api], attributes)
        given = options.headers if isinstance(options.headers, Mapping) else {}
        lower = {key.lower(): value for key, value in given.items()}
        added = {TRACE_HEADER: trace_ids.to_header(trace.trace_id, span.span_id)}
        if (name := current_agent_name(trace)) is not None:
            span.attributes["gen_ai.agent.name"] = name
            added[AGENT_HEADER] = to_header(name)
        options.headers = {**given, **{name: value for name, value in added.items() if name not in lower}}
        return TracedCall(self, api, span, raw=lower.get(RAW_HEADER) not in (None, "stream"))


class TracedCall:
    """One call between its request and the end of its answer."""

    def __init__(self, client: Client, api: str, span: OpenSpan, raw: bool):
        self.client = client
        self.api = api
        self.span = span
        self.raw = raw
        """Whether the result is a response that is parsed on demand, and keeps what was parsed."""

    def fail(self, error: BaseException) -> None:
        """It raised, maybe amid its answer."""
        self.span.attributes.update(format_exception_attributes(error))
        self.span.end("ERROR", f"{type(error).__name__}: {error}")

    def end(self, answer: Mapping[str, Any]) -> None:
        """It was answered in full, or its caller has enough."""
        if self.span.is_open:
            self.read(answer)
            self.span.end("OK")

    def read(self, answer: Mapping[str, Any]) -> None:
        """Take over what there is of the answer."""
        try:
            self.span.attributes.update(self.client.response_attributes(self.api, answer))
        except Exception:  # an answer in an unknown shape is no reason for the agent's call to fail
            logger.warning("an answer of %s could not be read for its span", self.span.name, exc_info=True)

    def answered(self, result: Any) -> None:
        """It returned: an answer, or a stream, which is watched."""
        if hasattr(result, "_iterator"):
            self._watch(result)
        elif hasattr(result, "model_dump"):
            self.end(_as_map(result))
        else:
            self.span.end("OK")  # of with_streaming_response: its bytes are the caller's

    def answered_by(self, parse: Callable[[], Any]) -> None:
        """It returned a raw response."""
        try:
            self.answered(parse())
        except Exception as error:  # the caller will meet it where it parses
            self.fail(error)

    async def answered_by_async(self, parse: Callable[[], Any]) -> None:
        """It returned a raw response, whose ``parse`` is async in newer clients."""
        try:
            parsed = parse()
            self.answered(await parsed if inspect.isawaitable(parsed) else parsed)
        except Exception as error:  # the caller will meet it where it parses
            self.fail(error)

    def _watch(self, stream: Any) -> None:
        streamed = self.client.streamed_answer(self.api)
        close = stream.close
        if hasattr(stream, "__aiter__"):
            stream._iterator = _watched_async(self, stream._iterator, streamed)

            async def close_async() -> None:
                await close()
                self.end(streamed.answer)

            stream.close = close_async
        else:
            stream._iterator = _watched(self, stream._iterator, streamed)

            def close_sync() -> None:
                close()
                self.end(streamed.answer)

            stream.close = close_sync

    def take(self, streamed: StreamedAnswer, chunk: Any) -> None:
        """The next chunk of a stream; one in an unknown shape is passed over."""
        try:
            streamed.add(_as_map(chunk))
        except Exception:  # it is the caller's all the same
            logger.warning("a chunk of %s could not be read for its span", self.span.name, exc_info=True)


def _as_map(answer: Any) -> Mapping[str, Any]:
    return answer if isinstance(answer, Mapping) else answer.model_dump(exclude_unset=True, warnings=False)


def _watched(call: TracedCall, chunks: Iterator[Any], streamed: StreamedAnswer) -> Iterator[Any]:
    try:
        for chunk in chunks:
            call.take(streamed, chunk)
            yield chunk
    except GeneratorExit:
        raise
    except BaseException as error:
        call.read(streamed.answer)
        call.fail(error)
        raise
    finally:
        call.end(streamed.answer)


async def _watched_async(call: TracedCall, chunks: AsyncIterator[Any], streamed: StreamedAnswer) -> AsyncIterator[Any]:
    try:
        async for chunk in chunks:
            call.take(streamed, chunk)
            yield chunk
    except GeneratorExit:
        raise
    except BaseException as error:
        call.read(streamed.answer)
        call.fail(error)
        raise
    finally:
        call.end(streamed.answer)
