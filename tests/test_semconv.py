"""Names, letter for letter: agents, algorithms and tools that read spans depend on them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import lightning_ray as lr
from lightning_ray import semconv

NAMES = {
    "AGL_ANNOTATION": "agentlightning.annotation",
    "AGL_MESSAGE": "agentlightning.message",
    "AGL_OBJECT": "agentlightning.object",
    "AGL_EXCEPTION": "agentlightning.exception",
    "AGL_OPERATION": "agentlightning.operation",
    "AGL_REWARD": "agentlightning.reward",
    "AGL_VIRTUAL": "agentlightning.virtual",
}
ENUMS: dict[Any, dict[str, str]] = {
    semconv.LightningResourceAttributes: {
        "ROLLOUT_ID": "agentlightning.rollout_id",
        "ATTEMPT_ID": "agentlightning.attempt_id",
        "SPAN_SEQUENCE_ID": "agentlightning.span_sequence_id",
        "TRACER_NAME": "agentlightning.tracer.name",
    },
    semconv.LightningSpanAttributes: {
        "REWARD": "agentlightning.reward",
        "LINK": "agentlightning.link",
        "TAG": "agentlightning.tag",
        "MESSAGE_BODY": "agentlightning.message.body",
        "OBJECT_TYPE": "agentlightning.object.type",
        "OBJECT_LITERAL": "agentlightning.object.literal",
        "OBJECT_JSON": "agentlightning.object.json",
        "OPERATION_NAME": "agentlightning.operation.name",
        "OPERATION_INPUT": "agentlightning.operation.input",
        "OPERATION_OUTPUT": "agentlightning.operation.output",
    },
    semconv.RewardAttributes: {"REWARD_NAME": "name", "REWARD_VALUE": "value"},
    semconv.LinkAttributes: {"KEY_MATCH": "key_match", "VALUE_MATCH": "value_match"},
    lr.SpanNames: {
        "REWARD": "agentlightning.reward",
        "MESSAGE": "agentlightning.message",
        "OBJECT": "agentlightning.object",
        "EXCEPTION": "agentlightning.exception",
        "VIRTUAL": "agentlightning.virtual",
        "ROLLOUT_ID": "agentlightning.rollout_id",
        "ATTEMPT_ID": "agentlightning.attempt_id",
        "SPAN_SEQUENCE_ID": "agentlightning.span_sequence_id",
    },
    lr.SpanAttributeNames: {"MESSAGE": "message", "OBJECT": "object"},
}


def test_the_names_of_spans() -> None:
    assert {name: getattr(semconv, name) for name in NAMES} == NAMES


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_the_names_of_attributes(enum: Any) -> None:
    assert {member.name: member.value for member in enum} == ENUMS[enum]


def test_the_models_of_rewards_and_links() -> None:
    assert semconv.RewardPydanticModel(name="a", value=1).value == 1.0
    assert semconv.LinkPydanticModel(key_match="span_id", value_match="s").key_match == "span_id"
    with pytest.raises(ValidationError):
        semconv.RewardPydanticModel.model_validate({"name": "a", "value": "high"})


@pytest.mark.parametrize("name", lr.__all__)
def test_what_is_exported_is_there(name: str) -> None:
    assert getattr(lr, name) is not None


def test_what_is_not_exported_is_refused() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lr.nonsense  # type: ignore[attr-defined]
