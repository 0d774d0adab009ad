"""What the capture must know of one wire API, and no more: where it is, how it says an error, what only it can tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

Body = Mapping[str, Any]

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class Dialect(ABC):
    """One wire API."""

    api: ClassVar[str]
    """Its name in ``semconv.MODEL_CALL_NAMES``."""
    path: ClassVar[str]

    def refusal(self, body: Body) -> str | None:
        """Why this request cannot be captured, with what to do instead; None if it can."""
        return None

    @abstractmethod
    def continues(self, body: Body) -> bool:
        """Whether the model has spoken before in this conversation."""

    def error(self, status: int, reason: str) -> dict[str, Any]:
        """The body of an error, as this API's clients read it; OpenAI's shape."""
        return openai_error(status, reason)


def openai_error(status: int, reason: str) -> dict[str, Any]:
    """An error's body in OpenAI's shape."""
    kind = ERROR_TYPES.get(status, "api_error")
    return {"error": {"message": reason, "type": kind, "param": None, "code": status}}


def any_role(messages: Any, role: str) -> bool:
    """Whether one of the messages is of a role."""
    return isinstance(messages, list) and any(isinstance(m, Mapping) and m.get("role") == role for m in messages)
