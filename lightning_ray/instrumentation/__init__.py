"""Clients of models that are traced where they are called, inside of attempts only."""

from importlib.util import find_spec

from lightning_ray.instrumentation.anthropic import instrument_anthropic, uninstrument_anthropic
from lightning_ray.instrumentation.openai import instrument_openai, uninstrument_openai


def instrument_clients(prompts: bool = True) -> None:
    """Trace every client that is installed; once is enough. ``prompts=False`` leaves requests' messages out."""
    instrument_openai(prompts)
    if find_spec("anthropic") is not None:
        instrument_anthropic(prompts)


__all__ = [
    "instrument_anthropic",
    "instrument_clients",
    "instrument_openai",
    "uninstrument_anthropic",
    "uninstrument_openai",
]
