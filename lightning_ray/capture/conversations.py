"""Token-in-token-out continuation: a prompt that continues what was said gets the ids that said it.

A chat template writes the conversation anew for each turn, and the tokenizer reads it anew, so that ids which were
sampled can come back as other ids of the same text. ``restored`` puts the stored ids back for the part of the prompt
that was seen before; what follows keeps the prompt's own ids where they begin there. Invariants: the text is the
same before and after; a prompt that does not continue any known text as text is left as it is.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

Attempt = tuple[str, str]
TOKENS_KEPT = 16_000_000
"""Of all attempts; four bytes each."""
SEQUENCES_TRIED = 16
"""Of an attempt's sequences that a prompt is compared with, longest first."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    all_special_ids: list[int]

    def decode(self, token_ids: Any, skip_special_tokens: bool = ..., **options: Any) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = ..., **options: Any) -> list[int]: ...


Load = Callable[[Attempt], Awaitable[Sequence[Sequence[int]]]]
"""Prompt and sampled ids of an attempt's calls, from the span store: what another replica saw."""


class Conversations:
    """What was said in the attempts that were lately at work."""

    def __init__(self, tokenizer: Tokenizer, load: Load | None = None, tokens_kept: int = TOKENS_KEPT):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._load = load
        self._tokens_kept = tokens_kept
        self._tokens = 0
        self._said: OrderedDict[Attempt, list[array[int]]] = OrderedDict()

    def add(self, attempt: Attempt, token_ids: Sequence[int]) -> None:
        """Note a call's prompt and sampled ids."""
        said = self._said.setdefault(attempt, [])
        self._said.move_to_end(attempt)
        said.append(array("i", token_ids))
        self._tokens += len(token_ids)
        while self._tokens > self._tokens_kept and len(self._said) > 1:
            _, forgotten = self._said.popitem(last=False)
            self._tokens -= sum(len(ids) for ids in forgotten)

    async def restored(self, attempt: Attempt, prompt_ids: list[int]) -> list[int]:
        """The prompt, with the ids that said the part of it which was said before."""
        if attempt not in self._said and self._load is not None:
            for ids in await self._load(attempt):
                self.add(attempt, ids)
            self._said.setdefault(attempt, [])
        candidates = sorted(self._said.get(attempt, ()), key=len, reverse=True)[:SEQUENCES_TRIED]
        prompt = array("i", prompt_ids)
        for said in candidates:
            shared = common_prefix(said, prompt)
            if shared == len(said):
                return prompt_ids
            if (restored := self._continued(said, prompt_ids, shared)) is not None:
                return restored
        return prompt_ids

    def _continued(self, said: array[int], prompt: list[int], shared: int) -> list[int] | None:
        """``said`` and what follows it in the prompt, if the prompt's text begins with that of ``said``."""
        anchor = self._anchor(said, shared)
        before, whole = self._text(said[anchor:]), self._text(prompt[anchor:])
        if not whole.startswith(before) or "\ufffd" in before[-1:]:
            return None
        rest = whole[len(before) :]
        following = self._following(prompt, anchor, rest)
        restored = [*said, *following]
        return restored if self._text(restored[anchor:]) == whole else None

    def _anchor(self, said: array[int], shared: int) -> int:
        """A place in the common part where text can be cut: behind its last special token."""
        for index in range(shared - 1, -1, -1):
            if said[index] in self._special:
                return index
        return 0

    def _following(self, prompt: list[int], anchor: int, rest: str) -> list[int]:
        """The prompt's own ids of its last part ``rest``; encoded anew if that begins amid a token."""
        low, high = anchor, len(prompt)
        while low < high:  # the text of what follows gets shorter with each token
            middle = (low + high) // 2
            if len(self._text(prompt[middle:])) > len(rest):
                low = middle + 1
            else:
                high = middle
        if self._text(prompt[low:]) == rest:
            return prompt[low:]
        return self._tokenizer.encode(rest, add_special_tokens=False)

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def common_prefix(a: array[int], b: array[int]) -> int:
    """How many leading entries are equal."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
