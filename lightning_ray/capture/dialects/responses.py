"""OpenAI's responses."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_ray.capture.dialects.base import Body, Dialect, any_role

_SPOKEN = ("function_call", "reasoning")


class Responses(Dialect):
    """``/v1/responses``."""

    api = "responses"
    path = "/v1/responses"

    def refusal(self, body: Body) -> str | None:
        """An answer that comes later, elsewhere, cannot be stored before it is given."""
        if body.get("background"):
            return "background=true cannot be captured: the answer would be given outside of this call; leave it out"
        return None

    def continues(self, body: Body) -> bool:
        """Whether there is an output item among the input, or a previous response."""
        items = body.get("input")
        if body.get("previous_response_id") or any_role(items, "assistant"):
            return True
        return isinstance(items, list) and any(isinstance(i, Mapping) and i.get("type") in _SPOKEN for i in items)
