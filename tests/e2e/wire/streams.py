"""Answers as they compare: without what is their own."""

from __future__ import annotations

import json
from typing import Any

OWN = ("id", "item_id", "call_id", "created", "created_at", "completed_at", "signature")
"""What differs from one answer of a server to the next."""


def plain(value: Any) -> Any:
    """Without what is an answer's own."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: "its own" if key in OWN else plain(item) for key, item in value.items()}
    return value


def events(text: str) -> list[Any]:
    """A stream's events, their kind and data; those of several choices one choice after the other."""
    found = []
    for event in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else plain(json.loads(data))))
    return sorted(found, key=_choice)


def _choice(event: tuple[str | None, Any]) -> int:
    """Which choice an event belongs to; those of none come last."""
    choices = event[1].get("choices") if isinstance(event[1], dict) else None
    return 0 if choices is None and event[1] != "[DONE]" else choices[0]["index"] if choices else 1000
