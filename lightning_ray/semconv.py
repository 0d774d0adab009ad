"""Span and attribute names, letter for letter those of Agent Lightning 0.3, and our own beside them."""

from __future__ import annotations

from enum import Enum, StrEnum

from pydantic import BaseModel

AGL_ANNOTATION = "agentlightning.annotation"
"""A reward, a tag or any other key-value pairs about a rollout."""
AGL_MESSAGE = "agentlightning.message"
AGL_OBJECT = "agentlightning.object"
AGL_EXCEPTION = "agentlightning.exception"
AGL_OPERATION = "agentlightning.operation"
"""A function or block of the agent's that was traced."""
AGL_REWARD = "agentlightning.reward"
AGL_VIRTUAL = "agentlightning.virtual"
"""A span that nothing emitted: an adapter puts it where a tree needs a root."""

REWARD = "agentlightning.reward"
"""Prefix of a reward's attributes: ``agentlightning.reward.{i}.name`` and ``.value``; index 0 is the primary."""

MODEL_CALL_NAMES = {
    "chat": "openai.chat.completion",
    "completions": "openai.completion",
    "responses": "openai.response",
    "messages": "anthropic.message",
}
"""Span name of a model call, by wire API."""

RESPONSE_ID = "gen_ai.response.id"
"""Attribute of a model call: the id that the endpoint gave its answer. The same call has the same id wherever seen."""

IMAGE_SPAN = "lightning_ray.image"
"""A span that holds an image which model calls of its attempt refer to."""
SUPERSEDED_SPAN = "lightning_ray.superseded"
"""A span that says: the model call whose span is my parent was given up by its client, which sent it again."""
ATTEMPT_SPAN = "lightning_ray.attempt"
"""The span that is an attempt itself: the root of its trace. Not stored: the store's record of the attempt tells it."""
TRAINED_SPAN = "lightning_ray.trained"
"""A span that says: a training step learned from this attempt. One for each policy that did."""
DROPPED_SPAN = "lightning_ray.dropped"
"""A span that says: a training step had this attempt, and did not learn from it; attribute ``lightning_ray.reason``."""
STEP_SPAN = "lightning_ray.train_step"
"""A training step of a policy, linked with its attempts' ``trained`` and ``dropped``. Not stored: they tell it."""

CLIENT_SPAN = "client_span"
"""Attribute of a captured model call: the span of its client's that it comes from, if the client said so."""
UNFINISHED = "lightning_ray.unfinished"
"""Attribute of a span that was still open when its attempt ended: true."""


class LightningResourceAttributes(Enum):
    """Attributes of a resource (in OpenTelemetry's sense) that say whose its spans are."""

    ROLLOUT_ID = "agentlightning.rollout_id"
    ATTEMPT_ID = "agentlightning.attempt_id"
    SPAN_SEQUENCE_ID = "agentlightning.span_sequence_id"
    TRACER_NAME = "agentlightning.tracer.name"


class LightningSpanAttributes(Enum):
    """Attributes of spans. ``REWARD``, ``LINK`` and ``TAG`` are prefixes, followed by an index."""

    REWARD = "agentlightning.reward"
    LINK = "agentlightning.link"
    TAG = "agentlightning.tag"
    MESSAGE_BODY = "agentlightning.message.body"
    OBJECT_TYPE = "agentlightning.object.type"
    """Qualified name of the object's type."""
    OBJECT_LITERAL = "agentlightning.object.literal"
    """The object as text, if it is a string, number, boolean or bytes (base64)."""
    OBJECT_JSON = "agentlightning.object.json"
    """Any other object as JSON."""
    OPERATION_NAME = "agentlightning.operation.name"
    OPERATION_INPUT = "agentlightning.operation.input"
    OPERATION_OUTPUT = "agentlightning.operation.output"


class RewardAttributes(Enum):
    """What follows ``agentlightning.reward.{i}.``; dimension 0 is the primary."""

    REWARD_NAME = "name"
    REWARD_VALUE = "value"


class RewardPydanticModel(BaseModel):
    """One dimension of a reward."""

    name: str
    value: float


class LinkAttributes(Enum):
    """What follows ``agentlightning.link.{i}.``: a link points to the spans that have this value under this key.

    The keys ``trace_id`` and ``span_id`` mean those of the span itself.
    """

    KEY_MATCH = "key_match"
    VALUE_MATCH = "value_match"


class LinkPydanticModel(BaseModel):
    """One condition of a link."""

    key_match: str
    value_match: str


class SpanNames(StrEnum):
    """Names as Agent Lightning 0.1 had them. Deprecated: use the constants above."""

    REWARD = "agentlightning.reward"
    MESSAGE = "agentlightning.message"
    OBJECT = "agentlightning.object"
    EXCEPTION = "agentlightning.exception"
    VIRTUAL = "agentlightning.virtual"
    ROLLOUT_ID = "agentlightning.rollout_id"
    ATTEMPT_ID = "agentlightning.attempt_id"
    SPAN_SEQUENCE_ID = "agentlightning.span_sequence_id"


class SpanAttributeNames(StrEnum):
    """Attributes as Agent Lightning 0.1 had them. Deprecated: use ``LightningSpanAttributes``."""

    MESSAGE = "message"
    OBJECT = "object"
