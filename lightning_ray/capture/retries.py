"""One turn counts once: a call that its client's SDK sends again takes the place of the one it gave up.

OpenAI's and Anthropic's clients number their retries (``x-stainless-retry-count``). A retry supersedes one earlier call
of the same attempt with the same digest and a smaller number: one that was given up if there is such, otherwise one
that is still at work, otherwise the latest. Calls that are alike but no retries (best of n) count each.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

RETRY_HEADER = b"x-stainless-retry-count"
CALLS_KEPT = 20_000

Attempt = tuple[str, str]


@dataclass(eq=False)
class SentCall:
    """One call, as far as its retries need to know."""

    attempt: Attempt
    digest: str
    retry: int
    place: int = 0
    """Among the calls that are alike; a retry has that of the call it supersedes."""
    span_ids: list[str] = field(default_factory=list)
    delivered: bool | None = None
    """Whether its answer went out in full; None while it is at work."""
    superseded: bool = False
    told: int = 0
    """How many of its spans its retry has told to be superseded; those that come later it tells itself."""

    def supersede(self) -> list[str]:
        """A retry takes its place: the ids of its spans until now."""
        self.superseded = True
        self.told = len(self.span_ids)
        return list(self.span_ids)

    def untold(self) -> list[str]:
        """The ids of its spans that came after its retry did."""
        return self.span_ids[self.told :] if self.superseded else []


class SentCalls:
    """The latest calls of this replica, by attempt and digest."""

    def __init__(self, kept: int = CALLS_KEPT):
        self._kept = kept
        self._calls: OrderedDict[SentCall, None] = OrderedDict()
        self._alike: dict[tuple[Attempt, str], list[SentCall]] = {}

    def begin(self, attempt: Attempt, digest: str, retry: int) -> tuple[SentCall, list[str]]:
        """A call begins: its record, and the ids of the spans that it supersedes."""
        alike = self._alike.setdefault((attempt, digest), [])
        before = [call for call in reversed(alike) if call.retry < retry and not call.superseded]
        given_up = max(before, key=_likely_given_up, default=None)
        gone = [] if given_up is None else given_up.supersede()
        place = sum(not call.retry for call in alike) if given_up is None else given_up.place
        call = SentCall(attempt, digest, retry, place)
        alike.append(call)
        self._calls[call] = None
        if len(self._calls) > self._kept:
            self._forget(next(iter(self._calls)))
        return call, gone

    def _forget(self, call: SentCall) -> None:
        del self._calls[call]
        key = (call.attempt, call.digest)
        self._alike[key].remove(call)
        if not self._alike[key]:
            del self._alike[key]


def _likely_given_up(call: SentCall) -> tuple[int, int]:
    return {False: 2, None: 1, True: 0}[call.delivered], call.retry


def digest_of(path: str, body: bytes) -> str:
    """What two calls have in common that ask the same."""
    return hashlib.blake2b(body, digest_size=16, person=path.encode()[-16:]).hexdigest()


def retry_of(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The number of a retry; 0 for the first try, and for clients that do not number."""
    for name, value in headers:
        if name == RETRY_HEADER and value.isdigit() and len(value) < 10:
            return int(value)
    return 0
