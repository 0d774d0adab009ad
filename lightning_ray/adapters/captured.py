"""Model calls that were captured at their server, said in the words of a tracer's spans: what adapters read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.instrumentation.openai_attributes import request_attributes
from lightning_ray.semconv import MODEL_CALL_NAMES
from lightning_ray.span import Span

_APIS = {name: api for api, name in MODEL_CALL_NAMES.items() if api != "messages"}
_EXTRAS = {"agent": "gen_ai.agent.name", "prompt_ids": "prompt_token_ids", "sampled_ids": "response_token_ids"}
"""Field of a captured span -> attribute."""


def with_words(span: Span) -> Span:
    """The span, with its request and what was captured as attributes too. One that was not captured is itself."""
    request, extras = span.attributes.get("request"), span.model_extra or {}
    added: dict[str, Any] = {}
    if isinstance(request, Mapping) and span.name in _APIS:
        added.update(request_attributes(_APIS[span.name], request))
    for field, key in _EXTRAS.items():
        if (value := extras.get(field)) is not None:
            added[key] = value if isinstance(value, str) else [int(one) for one in value]
    return span.model_copy(update={"attributes": {**added, **span.attributes}}) if added else span
