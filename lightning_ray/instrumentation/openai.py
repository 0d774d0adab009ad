"""The OpenAI client: chat completions, completions and responses are traced."""

from __future__ import annotations

from lightning_ray.instrumentation.client_calls import Client
from lightning_ray.instrumentation.openai_attributes import request_attributes, response_attributes
from lightning_ray.instrumentation.openai_stream import OpenAIStream

OPENAI = Client(
    package="openai",
    apis={"/chat/completions": "chat", "/completions": "completions", "/responses": "responses"},
    request_attributes=request_attributes,
    response_attributes=response_attributes,
    streamed_answer=OpenAIStream,
)


def instrument_openai(prompts: bool = True) -> None:
    """Trace the OpenAI client of this process; once is enough. ``prompts=False`` leaves requests' messages out."""
    OPENAI.instrument(prompts)


def uninstrument_openai() -> None:
    """Undo ``instrument_openai``."""
    OPENAI.uninstrument()
