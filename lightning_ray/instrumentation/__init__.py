"""Clients of models that are traced where they are called, inside of attempts only."""

from lightning_ray.dropped import forget_collected
from lightning_ray.instrumentation.anthropic import instrument_anthropic, uninstrument_anthropic
from lightning_ray.instrumentation.openai import instrument_openai, uninstrument_openai


def instrument_clients(prompts: bool = True) -> None:
    """Trace every client that an agent imports; once is enough. ``prompts=False`` leaves requests' messages out.

    Those that it drops unclosed take no other call along (``dropped``).
    """
    forget_collected()
    instrument_openai(prompts)
    instrument_anthropic(prompts)


__all__ = [
    "instrument_anthropic",
    "instrument_clients",
    "instrument_openai",
    "uninstrument_anthropic",
    "uninstrument_openai",
]
