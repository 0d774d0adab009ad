"""A streamed answer, put together again from its chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class OpenAIStream:
    """Chunks of a streamed answer, as they come."""

    def __init__(self, api: str):
        self.api = api
        self.answer: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """The next chunk."""
        if self.api == "responses":
            if isinstance(whole := chunk.get("response"), Mapping):
                self.answer = dict(whole)
            return
        for field in ("id", "model", "system_fingerprint", "usage", "prompt_token_ids"):
            if chunk.get(field) is not None:
                self.answer[field] = chunk[field]
        for choice in chunk.get("choices") or ():
            self._add_choice(choice)
        self.answer["choices"] = [self._choices[index] for index in sorted(self._choices)]

    def _add_choice(self, piece: Mapping[str, Any]) -> None:
        choice = self._choices.setdefault(piece.get("index") or 0, {})
        if piece.get("finish_reason"):
            choice["finish_reason"] = piece["finish_reason"]
        if piece.get("token_ids"):
            choice["token_ids"] = choice.get("token_ids", []) + piece["token_ids"]
        if logprobs := (piece.get("logprobs") or {}).get("content"):
            choice.setdefault("logprobs", {"content": []})["content"].extend(logprobs)
        if self.api == "completions":
            choice["text"] = choice.get("text", "") + (piece.get("text") or "")
            return
        message = choice.setdefault("message", {"role": "assistant"})
        delta = piece.get("delta") or {}
        for field in ("content", "refusal", "reasoning_content"):
            if delta.get(field):
                message[field] = message.get(field, "") + delta[field]
        for call in delta.get("tool_calls") or ():
            _add_call(message.setdefault("tool_calls", []), call)


def _add_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    index = piece.get("index") or 0
    while len(calls) <= index:
        calls.append({"function": {"arguments": ""}})
    call, function = calls[index], piece.get("function") or {}
    for field in ("id", "type"):
        if piece.get(field):
            call[field] = piece[field]
    if function.get("name"):
        call["function"]["name"] = function["name"]
    call["function"]["arguments"] += function.get("arguments") or ""
