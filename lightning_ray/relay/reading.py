"""What an upstream's answer says: events of a stream as they come, or a whole body.

Reading never changes an answer, and an answer in an unknown shape is the client's all the same.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_ray.instrumentation.anthropic import AnthropicStream
from lightning_ray.instrumentation.client_calls import StreamedAnswer
from lightning_ray.instrumentation.openai_stream import OpenAIStream
from lightning_ray.relay.spend import Usage

_BOUNDARY = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LAST_EVENTS = ("message_stop", "response.completed", "response.incomplete", "response.failed", "error")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One event of a stream: its bytes up to and including the empty line, and its data if that is an object."""

    raw: bytes
    data: Mapping[str, Any] | None = None
    done: bool = False
    """Whether it is ``[DONE]``."""

    @property
    def is_last(self) -> bool:
        """Whether a client that has it has the whole answer."""
        return self.done or (self.data is not None and self.data.get("type") in _LAST_EVENTS)

    @property
    def is_only_usage(self) -> bool:
        """Whether it is the chunk that ``stream_options.include_usage`` adds."""
        return self.data is not None and self.data.get("choices") == [] and bool(self.data.get("usage"))


class Events:
    """Cuts a stream of bytes into its events; ``clean`` is applied to the bytes of each."""

    def __init__(self, clean: Callable[[bytes], bytes]) -> None:
        self._clean = clean
        self.rest = b""
        """What has come of the next event."""
        self._searched = 0

    def feed(self, raw: bytes) -> list[Event]:
        """The events that are whole now."""
        self.rest += raw
        events, begin = [], 0
        for boundary in _BOUNDARY.finditer(self.rest, self._searched):
            events.append(event_of(self._clean(self.rest[begin : boundary.end()])))
            begin = boundary.end()
        self.rest = self.rest[begin:]
        self._searched = max(0, len(self.rest) - 3)
        return events


def event_of(raw: bytes) -> Event:
    """Read one event."""
    lines = [line[5:].removeprefix(b" ") for line in raw.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    if data.strip() == b"[DONE]":
        return Event(raw, done=True)
    return Event(raw, read_object(data))


def read_object(raw: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Reading:
    """Reads one answer; ``api`` is the wire API's name, or None for what is no model call."""

    def __init__(self, api: str | None):
        self.answer: dict[str, Any] = {}
        """As a call without streaming would have returned it, so far."""
        self.error: str | None = None
        """Why the upstream itself says that it failed."""
        self._ended = False
        self._api = api
        self._stream: StreamedAnswer | None = None

    def add(self, event: Event) -> None:
        """The next event of a stream."""
        self._ended = self._ended or event.is_last
        if event.data is None or self._api is None:
            return
        self.error = self.error or _error_in(event.data)
        if self._stream is None:
            self._stream = AnthropicStream(self._api) if self._api == "messages" else OpenAIStream(self._api)
        try:
            self._stream.add(event.data)
        except Exception:
            logger.warning("an event of an upstream's stream could not be read", exc_info=True)
        self.answer = self._stream.answer

    def whole(self, raw: bytes, status: int) -> None:
        """The body of an answer that is no stream."""
        self.answer = read_object(raw) or {}
        self._ended = True
        if status >= 400:
            self.error = _error_in(self.answer) or f"the upstream answered {status}"
        elif self._api is not None:
            self.error = _error_in(self.answer)
            if not self.answer:
                self.error = "the upstream's answer is no JSON object"

    @property
    def is_whole(self) -> bool:
        """Whether it came to its end."""
        return self._ended or self.finish_reason is not None

    @property
    def usage(self) -> Usage | None:
        """The tokens it took."""
        usage = self.answer.get("usage")
        return Usage.of(usage) if isinstance(usage, Mapping) else None

    @property
    def finish_reason(self) -> str | None:
        """Of the first choice; the API's own word."""
        choices = self.answer.get("choices")
        if isinstance(choices, list):
            found = choices[0].get("finish_reason") if choices and isinstance(choices[0], Mapping) else None
        else:
            found = self.answer.get("stop_reason") or self._status()
        return found if isinstance(found, str) else None

    def _status(self) -> Any:
        status = self.answer.get("status") if self._api == "responses" else None
        return None if status in ("in_progress", "queued") else status


def _error_in(answer: Mapping[str, Any]) -> str | None:
    if answer.get("type") == "response.failed" and isinstance(answer.get("response"), Mapping):
        answer = answer["response"]
    error = answer.get("error")
    if not error:
        return str(answer.get("message") or "the upstream failed") if answer.get("type") == "error" else None
    return str(error.get("message") or error.get("type") or error) if isinstance(error, Mapping) else str(error)
