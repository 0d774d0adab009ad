"""Spans of a LiteLLM proxy into triplets, by ``sequence_id`` alone: clocks of several machines do not agree."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from lightning_ray.adapters.base import TraceToTripletBase, Triplet, our_spans
from lightning_ray.emitter.rewards import get_reward_value
from lightning_ray.semconv import RESPONSE_ID
from lightning_ray.span import Span

_RAW, _REQUEST = "raw_gen_ai_request", "litellm_request"


class LlmProxyTraceToTriplet(TraceToTripletBase):
    """One triplet for each call that has token ids; a reward goes to the latest call before it without one."""

    def adapt(self, source: Sequence[Any], /) -> list[Triplet]:
        """The triplets of one rollout's spans."""
        spans = sorted(our_spans(source), key=lambda span: (span.sequence_id, span.start_time or 0.0))
        calls: list[tuple[Span, Triplet]] = []
        seen: set[str] = set()
        for span in spans:
            prompt, response = _tokens(span)
            response_id = _response_id(span)
            if not prompt or not response or response_id in seen:
                continue
            if response_id is not None:
                seen.add(response_id)
            calls.append((span, _triplet(prompt, response, response_id)))
        for span in spans:
            if (value := get_reward_value(span)) is not None:
                for call, triplet in reversed(calls):
                    if triplet.reward is None and call.sequence_id < span.sequence_id:
                        triplet.reward = value
                        break
        return [triplet for _, triplet in calls]


def _triplet(prompt: list[int], response: list[int], response_id: str | None) -> Triplet:
    return Triplet(
        prompt={"token_ids": prompt}, response={"token_ids": response}, metadata={"response_id": response_id}
    )


def _tokens(span: Span) -> tuple[list[int], list[int]]:
    attributes = span.attributes
    if span.name == _REQUEST:
        return _ids(attributes.get("prompt_token_ids")), _ids(attributes.get("response_token_ids"))
    if span.name != _RAW:
        return [], []
    responses = _literal(attributes.get("llm.hosted_vllm.response_token_ids"))
    response = _ids(responses[0]) if isinstance(responses, list) and responses else []
    choices = _literal(attributes.get("llm.hosted_vllm.choices"))
    if not response and isinstance(choices, list) and choices and isinstance(choices[0], dict):
        response = _ids(choices[0].get("token_ids"))
    return _ids(attributes.get("llm.hosted_vllm.prompt_token_ids")), response


def _response_id(span: Span) -> str | None:
    found = span.attributes.get(RESPONSE_ID) or span.attributes.get("llm.hosted_vllm.id")
    return found if isinstance(found, str) else None


def _ids(value: Any) -> list[int]:
    value = _literal(value)
    return list(value) if isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value) else []


def _literal(value: Any) -> Any:
    """What a Python literal says; anything else is itself."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
