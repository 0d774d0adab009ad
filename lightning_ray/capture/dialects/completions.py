"""OpenAI's completions: a prompt of text or token ids."""

from __future__ import annotations

from lightning_ray.capture.dialects.base import Body
from lightning_ray.capture.dialects.chat import Chat


class Completions(Chat):
    """``/v1/completions``."""

    api = "completions"
    path = "/v1/completions"

    def continues(self, body: Body) -> bool:
        """Any prompt of text may hold what the model said before; ids are the client's own to keep."""
        return isinstance(body.get("prompt"), str)
