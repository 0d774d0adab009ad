"""What an upstream was asked for and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ray.relay.settings import Prices


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer, by the upstream's own count."""

    prompt: int
    completion: int
    cached: int = 0
    """Of the prompt's."""

    @classmethod
    def of(cls, usage: Mapping[str, Any]) -> Usage | None:
        """Of what an answer tells in any of the wire APIs; None if it tells nothing."""
        prompt, completion = _first(usage, "prompt_tokens", "input_tokens"), _first(usage, *_COMPLETION)
        if prompt is None and completion is None:
            return None
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        cached = _first(details, "cached_tokens") or _first(usage, "cached_tokens") or 0
        # Anthropic counts what it read from its cache, and wrote into it, beside the others.
        read, written = _first(usage, "cache_read_input_tokens"), _first(usage, "cache_creation_input_tokens")
        beside = (read or 0) + (written or 0)
        return cls((prompt or 0) + beside, completion or 0, cached + (read or 0))

    @property
    def total(self) -> int:
        """Prompt and answer."""
        return self.prompt + self.completion

    def cost(self, prices: Prices) -> float:
        """In the currency of the prices."""
        cached = prices.price_cached_input_per_million
        cached = prices.price_input_per_million if cached is None else cached
        prompt = (self.prompt - self.cached) * prices.price_input_per_million + self.cached * cached
        return (prompt + self.completion * prices.price_output_per_million) / 1e6


_COMPLETION = ("completion_tokens", "output_tokens")


def _first(usage: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


@dataclass
class Spend:
    """The sum of one upstream's calls."""

    calls: int = 0
    errors: int = 0
    """Of the calls."""
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts'."""
    completion_tokens: int = 0
    without_usage: int = 0
    """Answers that did not tell their tokens: what they cost is not in ``money``."""
    money: float = 0.0

    def add(self, usage: Usage | None, cost: float, failed: bool, answered: bool) -> None:
        """One more call has ended; ``answered`` if something of an answer came, be it broken off."""
        self.calls += 1
        self.errors += failed
        self.money += cost
        if usage is not None:
            self.prompt_tokens += usage.prompt
            self.cached_tokens += usage.cached
            self.completion_tokens += usage.completion
        elif answered:
            self.without_usage += 1

    def include(self, other: Spend) -> None:
        """Add what was spent elsewhere or before."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, Any]:
        """For the status."""
        return asdict(self) | {"money": round(self.money, 6)}
