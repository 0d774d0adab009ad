"""One turn counts once: a call that its client's SDK sends again takes the place of the one it gave up.

OpenAI's and Anthropic's clients number their retries (``x-stainless-retry-count``). A retry supersedes one earlier call
of the same attempt with the same digest and the number before: one that was not answered in full if there is such,
otherwise the latest. Calls that are alike but no retries (best of n) count each.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
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
    span_ids: list[str] = field(default_factory=list)
    delivered: bool = False
    """Whether its answer went out in full."""
    superseded: bool = False


class SentCalls:
    """The latest calls of this replica, by attempt and digest."""

    def __init__(self, kept: int = CALLS_KEPT):
        self._kept = kept
        self._calls: OrderedDict[SentCall, None] = OrderedDict()
        self._alike: dict[tuple[Attempt, str], list[SentCall]] = {}

    def begin(self, attempt: Attempt, digest: str, retry: int) -> tuple[SentCall, Sequence[str]]:
        """A call begins: its record, and the ids of the spans that it supersedes."""
        alike = self._alike.setdefault((attempt, digest), [])
        before = [call for call in alike if call.retry == retry - 1 and not call.superseded] if retry else []
        gone: Sequence[str] = ()
        if before:
            given_up = next((call for call in reversed(before) if not call.delivered), before[-1])
            given_up.superseded = True
            gone = given_up.span_ids
        call = SentCall(attempt, digest, retry)
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


def digest_of(path: str, body: bytes) -> str:
    """What two calls have in common that ask the same."""
    return hashlib.blake2b(body, digest_size=16, person=path.encode()[-16:]).hexdigest()


def retry_of(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The number of a retry; 0 for the first try, and for clients that do not number."""
    for name, value in headers:
        if name == RETRY_HEADER and value.isdigit():
            return int(value)
    return 0
