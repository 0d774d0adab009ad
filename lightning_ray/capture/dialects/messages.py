"""Anthropic's messages."""

from __future__ import annotations

from typing import Any

from lightning_ray.capture.dialects.base import ERROR_TYPES, Body, Dialect, any_role


class Messages(Dialect):
    """``/v1/messages``."""

    api = "messages"
    path = "/v1/messages"

    def continues(self, body: Body) -> bool:
        """Whether there is an assistant's message."""
        return any_role(body.get("messages"), "assistant")

    def error(self, status: int, reason: str) -> dict[str, Any]:
        """Anthropic's shape."""
        return {"type": "error", "error": {"type": ERROR_TYPES.get(status, "api_error"), "message": reason}}
