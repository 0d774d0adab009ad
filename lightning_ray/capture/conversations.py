"""Token-in-token-out continuation: a prompt that continues what was said gets the ids that said it.

A chat template writes the conversation anew for each turn, and the tokenizer reads it anew, so that ids which were
sampled can come back as other ids of the same text. ``restored`` puts the stored ids back for the part of the prompt
that was seen before; what follows keeps the prompt's own ids where they begin there. Invariants: the text is the
same before and after; a prompt that does not continue any known text as text is left as it is.

Ids are compared first. Text is read only between two tokens that stand for themselves (those that were added to the
tokenizer, as the marks of a turn are), and only where the ids differ.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

Attempt = tuple[str, str]
TOKENS_KEPT = 16_000_000
"""Of all attempts; four bytes each."""
ATTEMPTS_KEPT = 50_000
CONVERSATIONS_TRIED = 64
"""Of an attempt's conversations that a prompt is compared with, those first that share most of its ids."""
PLACES_TRIED = 4


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = ..., **options: Any) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = ..., **options: Any) -> list[int]: ...


Load = Callable[[Attempt], Awaitable[Sequence[Sequence[int]]]]
"""Prompt and sampled ids of an attempt's calls, from the span store: what another replica saw."""


@dataclass
class Conversation:
    """One conversation as it was said, from its first prompt to its last answer."""

    ids: np.ndarray
    ends: list[int]
    """Where its calls ended, ascending: a prompt may continue any of them."""

    def last_end(self, upto: int) -> int:
        """The last end at or before a place; 0 if there is none."""
        index = bisect_right(self.ends, upto)
        return self.ends[index - 1] if index else 0


@dataclass
class Said:
    """What was said in one attempt."""

    conversations: list[Conversation] = field(default_factory=list)
    tokens: int = 0
    """How many are held."""
    loaded: bool = False
    """Whether the span store was asked."""

    def add(self, ids: np.ndarray) -> None:
        """Note a call's ids: a conversation that they continue grows by them."""
        continued: Conversation | None = None
        for known in self.conversations:
            at = min(len(known.ids), len(ids)) - 1
            if at >= 0 and known.ids[at] != ids[at]:
                continue  # neither continues the other: told by one id, as an attempt may have many conversations
            shared = common_prefix(known.ids, ids)
            if shared == len(ids):
                if shared not in known.ends:
                    insort(known.ends, shared)
                return
            if shared == len(known.ids) and (continued is None or shared > len(continued.ids)):
                continued = known
        if continued is None:
            self.tokens += len(ids)
            self.conversations.append(Conversation(ids, [len(ids)]))
        else:
            self.tokens += len(ids) - len(continued.ids)
            continued.ids = ids
            continued.ends.append(len(ids))


class Continuation(NamedTuple):
    """How a prompt continues a conversation: ``said``, then ``following``, then the prompt's own from ``onwards``."""

    covered: int
    """How many of the prompt's ids ``said`` stands for."""
    said: np.ndarray
    following: Sequence[int]
    onwards: int
    exact: bool
    """Whether the prompt has these very ids."""


class Conversations:
    """What was said in the attempts that were lately at work."""

    def __init__(self, tokenizer: Tokenizer, load: Load | None = None, tokens_kept: int = TOKENS_KEPT):
        self._reader = Reader(tokenizer)
        self._load = load
        self._loading: dict[Attempt, asyncio.Task[None]] = {}
        self._tokens_kept = tokens_kept
        self._tokens = 0
        self._said: OrderedDict[Attempt, Said] = OrderedDict()

    def add(self, attempt: Attempt, token_ids: Sequence[int]) -> None:
        """Note a call's prompt and sampled ids."""
        said = self._of(attempt)
        self._tokens -= said.tokens
        said.add(np.array(token_ids, np.int32))
        self._tokens += said.tokens
        while self._tokens > self._tokens_kept and len(self._said) > 1:
            self._forget()

    async def restored(self, attempt: Attempt, prompt_ids: list[int]) -> list[int]:
        """The prompt, with the ids that said the part of it which was said before."""
        prompt = Cut(np.array(prompt_ids, np.int32), self._reader)
        found = self._continuation(attempt, prompt)
        if found is None and await self._loads(attempt):
            found = self._continuation(attempt, prompt)
        if found is None or found.exact:
            return prompt_ids
        return [*found.said.tolist(), *found.following, *prompt_ids[found.onwards :]]

    async def _loads(self, attempt: Attempt) -> bool:
        """Whether there may be more to know, which then has been loaded."""
        if self._load is None or self._of(attempt).loaded:
            return False
        loading = self._loading.get(attempt)
        if loading is None:
            loading = self._loading[attempt] = asyncio.ensure_future(self._load_now(self._load, attempt))
            loading.add_done_callback(lambda _: self._loading.pop(attempt, None))
        await asyncio.shield(loading)
        return True

    async def _load_now(self, load: Load, attempt: Attempt) -> None:
        for ids in await load(attempt):
            self.add(attempt, ids)
        self._of(attempt).loaded = True

    def _of(self, attempt: Attempt) -> Said:
        said = self._said.setdefault(attempt, Said())
        self._said.move_to_end(attempt)
        if len(self._said) > ATTEMPTS_KEPT:
            self._forget()
        return said

    def _forget(self) -> None:
        _, forgotten = self._said.popitem(last=False)
        self._tokens -= forgotten.tokens

    def _continuation(self, attempt: Attempt, prompt: Cut) -> Continuation | None:
        """Of the conversation that stands for most of the prompt."""
        if attempt not in self._said:
            return None
        known = []
        for conversation in self._said[attempt].conversations:
            shared = common_prefix(conversation.ids, prompt.ids)
            if shared == len(prompt):  # all of it was said, by these very ids
                return Continuation(shared, prompt.ids, (), shared, exact=True)
            known.append((shared, conversation))
        known.sort(key=lambda item: item[0], reverse=True)
        found = [continuation(c, prompt, self._reader) for _, c in known[:CONVERSATIONS_TRIED]]
        return max((f for f in found if f is not None), key=lambda f: f.covered, default=None)


class Reader:
    """The tokenizer as it is used here."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
        try:
            tokenizer.decode([], skip_special_tokens=False, **self._options)
        except TypeError:  # only some clean up, and know how to leave it
            self._options = {}
        added = [
            token_id for token, token_id in tokenizer.get_added_vocab().items() if token.lstrip(" \n\t\u2581") == token
        ]
        alone = np.array([*tokenizer.all_special_ids, *added], np.int64)
        self._alone = np.zeros(max(alone, default=0) + 2, np.bool_)
        self._alone[alone] = True

    def text(self, ids: np.ndarray) -> str:
        """As it is, with special tokens."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, **self._options)

    def encode(self, text: str) -> list[int]:
        """As it is, with no tokens around it."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def cuts(self, ids: np.ndarray) -> np.ndarray:
        """Places of tokens that stand for themselves: text is cut before them, and nowhere else for sure."""
        return np.flatnonzero(self._alone.take(ids, mode="clip"))


class Cut:
    """Ids and where their text can be cut."""

    def __init__(self, ids: np.ndarray, reader: Reader):
        self.ids = ids
        self._reader = reader
        self._cuts: np.ndarray | None = None
        self._texts: dict[tuple[int, int], str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def cuts(self) -> np.ndarray:
        """Ascending places."""
        if self._cuts is None:
            self._cuts = self._reader.cuts(self.ids)
        return self._cuts

    def before(self, place: int, least: int) -> int:
        """The last cut before ``place`` that is no less than ``least``, or that."""
        index = int(np.searchsorted(self.cuts, place)) - 1
        return max(least, int(self.cuts[index])) if index >= 0 else least

    def after(self, place: int) -> int:
        """The next cut behind ``place``, or the end."""
        index = int(np.searchsorted(self.cuts, place, "right"))
        return int(self.cuts[index]) if index < len(self.cuts) else len(self.ids)

    def text(self, start: int, end: int) -> str:
        """Of a part."""
        if (start, end) not in self._texts:
            self._texts[start, end] = self._reader.text(self.ids[start:end])
        return self._texts[start, end]


def continuation(conversation: Conversation, prompt: Cut, reader: Reader) -> Continuation | None:
    """How far a prompt continues a conversation: up to the last of its ends whose text the prompt begins with."""
    said = Cut(conversation.ids, reader)
    here = there = 0  # up to these places of said and prompt the texts are the same
    exact = True
    found: Continuation | None = None
    while True:
        same = common_prefix(said.ids[here:], prompt.ids[there:])
        end = conversation.last_end(here + same)
        if end >= max(here, 1) and (found is None or end > len(found.said)):
            upto = there + end - here
            found = Continuation(upto, said.ids[:end], (), upto, exact)
        reached = here + same
        if reached == len(said) or there + same == len(prompt):
            return found
        start = said.before(reached, here)
        there += start - here
        here = start
        a, b = said.after(here), prompt.after(there)
        text_b = prompt.text(there, b)
        begun = said.text(here, min(a, reached + 8))[:-4]  # less a character that may not be whole
        if not (text_b.startswith(begun) or begun.startswith(text_b)):
            return found
        text_a = said.text(here, a)
        while text_a != text_b:  # a token that stands for itself may have been said letter by letter
            if a < len(said) and text_b.startswith(text_a):
                text_a, a = text_a + said.text(a, said.after(a)), said.after(a)
            elif b < len(prompt) and text_a.startswith(text_b):
                text_b, b = text_b + prompt.text(b, prompt.after(b)), prompt.after(b)
            else:
                ends = [end for end in conversation.ends if reached < end <= a]
                return _ended_within(said, here, ends, prompt, there, b, reader) or found
        here, there, exact = a, b, False


def _ended_within(
    said: Cut, here: int, ends: list[int], prompt: Cut, there: int, onwards: int, reader: Reader
) -> Continuation | None:
    """The continuation of an end amid a part of the prompt, from ``there`` to ``onwards``."""
    whole = prompt.text(there, onwards)
    count = bisect_right(ends, False, key=lambda end: not whole.startswith(said.text(here, end)))
    if not count:
        return None
    end = ends[count - 1]
    before = said.text(here, end)
    rests = [prompt.ids[place:onwards].tolist() for place in _places(prompt, there, onwards, len(before))]
    for rest in (*rests, reader.encode(whole[len(before) :])):
        if reader.text(np.array([*said.ids[here:end], *rest])) == whole:
            return Continuation(onwards - len(rest), said.ids[:end], rest, onwards, exact=False)
    return None


def _places(prompt: Cut, start: int, end: int, characters: int) -> list[int]:
    """Where a part of the prompt may have had so many characters.

    It is read by halves, each once. A half that begins amid a character, or with a space, can be read as a little more
    or less than it is.
    """
    low, high, rest = start, end, characters
    while high - low > 64:
        middle = (low + high) // 2
        length = len(prompt.text(low, middle))
        if length < rest:
            low, rest = middle, rest - length
        else:
            high = middle
    near = range(max(start, low - 16), min(end, high + 16) + 1)
    back = len(prompt.text(near[0], low))
    lengths = {place: len(prompt.text(near[0], place)) - back for place in near}
    return sorted(near, key=lambda place: abs(lengths[place] - rest))[:PLACES_TRIED]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries are equal."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n
