"""Span and attribute names, letter for letter those of Agent Lightning 0.3, and our own beside them."""

from __future__ import annotations

AGL_ANNOTATION = "agentlightning.annotation"
AGL_MESSAGE = "agentlightning.message"
AGL_OBJECT = "agentlightning.object"
AGL_EXCEPTION = "agentlightning.exception"
AGL_OPERATION = "agentlightning.operation"
AGL_REWARD = "agentlightning.reward"
AGL_VIRTUAL = "agentlightning.virtual"

REWARD = "agentlightning.reward"
"""Prefix of a reward's attributes: ``agentlightning.reward.{i}.name`` and ``.value``; index 0 is the primary."""

MODEL_CALL_NAMES = {
    "chat": "openai.chat.completion",
    "completions": "openai.completion",
    "responses": "openai.response",
    "messages": "anthropic.message",
}
"""Span name of a captured model call, by wire API."""
