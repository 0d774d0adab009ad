"""OpenAI's chat completions."""

from __future__ import annotations

from lightning_ray.capture.dialects.base import Body, Dialect, any_role


class Chat(Dialect):
    """``/v1/chat/completions``."""

    api = "chat"
    path = "/v1/chat/completions"

    def refusal(self, body: Body) -> str | None:
        """Beam search draws no samples of the policy."""
        if body.get("use_beam_search"):
            return "use_beam_search=true cannot be captured: its answers are not samples of the policy; leave it out"
        return None

    def continues(self, body: Body) -> bool:
        """Whether there is an assistant's message."""
        return any_role(body.get("messages"), "assistant")
