"""One relayed call: what is known of it, and the answer that its span keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.capture.call import CapturedRequest
from lightning_ray.capture.dialects import DIALECTS, Dialect
from lightning_ray.relay.reading import Reading, read_object
from lightning_ray.relay.settings import Upstream
from lightning_ray.semconv import RESPONSE_ID

_STREAMS_WITH_USAGE = ("chat", "completions")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_BYTES_PER_TOKEN = 4


@dataclass
class RelayedAnswer:
    """An answer of another endpoint: words, no tokens of the policy, and so nothing to train on.

    Token ids that the endpoint tells (vLLM's ``return_token_ids``) stay in ``response``.
    """

    finish_reason: str | None
    failure: str | None
    """Why it was not answered in full."""
    found: dict[str, Any]
    queue_seconds: float
    """For the limits of the upstream."""
    first_byte: float | None
    """When its first byte came; Unix seconds."""
    weight_versions: list[int] = field(default_factory=list)

    def columns(self) -> dict[str, Any]:
        """The status, with the reason of a failure, and the finish reason."""
        status = {"status_code": "ERROR", "description": self.failure} if self.failure else "OK"
        return {"status": status, "finish_reason": self.finish_reason}

    def attributes(self, started: float, ended: float) -> dict[str, Any]:
        """The response, usage, cost and times."""
        first = None if self.first_byte is None else self.first_byte - started
        return {**self.found, "timing": {"queue": self.queue_seconds, "first_token": first, "total": ended - started}}


class RelayedCall:
    """A request on its way to an upstream, and what has come back."""

    def __init__(self, upstream_name: str, upstream: Upstream, scope: Mapping[str, Any], body: bytes):
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.method: str = scope["method"]
        self.headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self.dialect: Dialect | None = DIALECTS.get(self.path)
        self.reading = Reading(None if self.dialect is None else self.dialect.api)
        self.settled = False
        """Whether it was counted and captured."""
        self.retries = 0
        self.status: int | None = None
        """Of the upstream's answer."""
        self.failure: str | None = None
        """Why the relay gave up."""
        self.first_byte: float | None = None
        self.began = time.time()
        self.sent: float | None = None
        """When it passed the limits."""
        self._upstream_name = upstream_name
        self._upstream = upstream
        self._prepare(body)

    def _prepare(self, body: bytes) -> None:
        """The body as the upstream gets it; as it was sent unless something has to be put in."""
        self.body = body
        self.hide_usage = False
        """Whether the client did not ask for the chunk that tells the usage."""
        self.expected_tokens = len(body) // _BYTES_PER_TOKEN
        given = read_object(body) if self.method == "POST" else None
        if given is None:
            return
        self.expected_tokens += next((given[name] for name in _LIMITS if isinstance(given.get(name), int)), 0)
        changed = dict(given)
        if self._upstream.model is not None:
            changed["model"] = self._upstream.model
        if self.dialect is not None:
            for name, value in self._upstream.parameters.items():
                changed.pop(name, None)
                if value is not None:
                    changed[name] = value
        if self._upstream.ask_for_usage and given.get("stream") is True and self._streams_with_usage:
            options = given.get("stream_options")
            options = options if isinstance(options, dict) else {}
            self.hide_usage = not options.get("include_usage")
            changed["stream_options"] = {**options, "include_usage": True}
        if changed != given:
            self.body = json.dumps(changed).encode()

    @property
    def _streams_with_usage(self) -> bool:
        return self.dialect is not None and self.dialect.api in _STREAMS_WITH_USAGE

    @property
    def failed(self) -> str | None:
        """Why it was not answered in full; None if it was."""
        if self.failure or self.reading.error:
            return self.failure or self.reading.error
        return None if self.reading.is_whole else "the answer was broken off"

    @property
    def tokens(self) -> int | None:
        """How many it took; None if that is not known."""
        usage = self.reading.usage
        if usage is not None:
            return usage.total
        return None if self.answered else 0

    @property
    def answered(self) -> bool:
        """Whether something of an answer came that costs."""
        return self.first_byte is not None and (self.status or 0) < 400

    @property
    def cost(self) -> float:
        """In the currency of the prices."""
        usage = self.reading.usage
        return 0.0 if usage is None else usage.cost(self._upstream)

    def capture(self, request: CapturedRequest) -> None:
        """What has come of the answer becomes a span of the request."""
        usage, answer = self.reading.usage, self.reading.answer
        found: dict[str, Any] = {"upstream": self._upstream_name, "response": answer, "cost": self.cost}
        if usage is not None:
            found["usage"] = {
                "prompt_tokens": usage.prompt,
                "completion_tokens": usage.completion,
                "cached_tokens": usage.cached,
            }
        for name, key in (("id", RESPONSE_ID), ("model", "gen_ai.response.model")):
            if isinstance(value := answer.get(name), str):
                found[key] = value
        if self.retries:
            found["upstream_retries"] = self.retries
        if self.status is not None and self.status >= 400:
            found["upstream_status"] = self.status
        queued = (self.sent or time.time()) - self.began
        kept = RelayedAnswer(self.reading.finish_reason, self.failed, found, queued, self.first_byte)
        request.sequences.append(kept)
