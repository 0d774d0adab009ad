"""A call that its client sends again counts once; calls that are alike count each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lightning_ray.capture.edge import Limits
from lightning_ray.capture.retries import SentCall, SentCalls, digest_of, retry_of
from lightning_ray.errors import InfrastructureError
from lightning_ray.semconv import SUPERSEDED_SPAN
from tests.capture_client import CHAT, Client, bearer, respond, sampling

AT = ("ro-1", "at-1")


def begin(sent: SentCalls, retry: int = 0, *span_ids: str, digest: str = "d", attempt: Any = AT) -> SentCall:
    call, _ = sent.begin(attempt, digest, retry)
    call.span_ids = list(span_ids)
    return call


def test_a_retry_supersedes_the_call_that_was_given_up() -> None:
    sent = SentCalls()
    given_up, delivered = begin(sent, 0, "a"), begin(sent, 0, "b")
    given_up.delivered, delivered.delivered = False, True
    working = begin(sent, 0, "c")
    assert sent.begin(AT, "d", 1)[1] == ["a"]
    assert (given_up.superseded, delivered.superseded, working.superseded) == (True, False, False)


def test_without_such_it_supersedes_one_at_work_and_then_the_latest() -> None:
    sent = SentCalls()
    for name in "abc":
        begin(sent, 0, name).delivered = True
    begin(sent, 0, "working")
    assert [sent.begin(AT, "d", 1)[1] for _ in range(5)] == [["working"], ["c"], ["b"], ["a"], []]


def test_each_retry_supersedes_the_one_before() -> None:
    sent = SentCalls()
    for retry, gone in enumerate([[], ["0"], ["1"], ["2"]]):
        call, superseded = sent.begin(AT, "d", retry)
        assert superseded == gone
        call.span_ids, call.delivered = [str(retry)], False


def test_a_retry_whose_forerunner_never_came_supersedes_the_one_before_that() -> None:
    sent = SentCalls()
    begin(sent, 0, "a").delivered = False
    assert sent.begin(AT, "d", 2)[1] == ["a"]


def test_calls_that_are_alike_count_each_and_a_retry_takes_its_calls_place() -> None:
    sent = SentCalls()
    assert all(sent.begin(AT, "d", 0)[1] == [] for _ in range(5))
    calls = [begin(sent, digest="e") for _ in range(3)]
    calls[1].delivered = False
    again, other = begin(sent, 1, digest="e"), begin(sent, digest="e")
    assert [call.place for call in (*calls, again, other)] == [0, 1, 2, 1, 3]


@pytest.mark.parametrize(
    ("attempt", "digest", "retry"), [(("ro-1", "at-2"), "d", 1), (("ro-2", "at-1"), "d", 1), (AT, "e", 1), (AT, "d", 3)]
)
def test_only_what_is_alike_is_superseded(attempt: Any, digest: str, retry: int) -> None:
    sent = SentCalls()
    begin(sent, 3, "a").delivered = False
    assert sent.begin(attempt, digest, retry)[1] == []


def test_spans_that_come_late_are_told_by_the_call_itself() -> None:
    sent = SentCalls()
    call = begin(sent, 0, "early")
    assert call.untold() == []
    assert sent.begin(AT, "d", 1)[1] == ["early"]
    call.span_ids.append("late")
    assert call.untold() == ["late"]


def test_only_so_many_calls_are_kept() -> None:
    sent = SentCalls(kept=10)
    for number in range(1000):
        begin(sent, 0, str(number), digest=str(number % 100))
    assert len(sent._calls) == 10 and sum(len(alike) for alike in sent._alike.values()) == 10
    assert sent.begin(AT, "0", 1)[1] == [] and sent.begin(AT, "99", 1)[1] == ["999"]
    for _ in range(1000):
        begin(sent, 0, digest="same")
    assert len(sent._calls) == 10 and list(sent._alike) == [(AT, "same")]


def test_digests_tell_bodies_and_routes_apart() -> None:
    digests = [digest_of(path, body) for path in (CHAT, "/v1/completions", "/v1/messages") for body in (b"a", b"b")]
    assert len(set(digests)) == 6 and digest_of(CHAT, b"a") == digests[0]


@pytest.mark.parametrize(
    ("value", "retry"),
    [(b"0", 0), (b"2", 2), (b"", 0), (b"-1", 0), (b"one", 0), (b"\xb2", 0), (b"9" * 5000, 0), (b"9" * 20, 0)],
)
def test_the_number_of_a_retry_is_read(value: bytes, retry: int) -> None:
    assert retry_of([(b"accept", b"1"), (b"x-stainless-retry-count", value)]) == retry
    assert retry_of([]) == 0


class Retrying(Client):
    """A client that numbers its retries."""

    def __init__(self, app: Any = None, limits: Limits | None = None) -> None:
        super().__init__(app, limits)
        self.calls: list[int] = []

    async def send(self, retry: int = 0, hold: bool = False, **body: Any) -> int:
        headers = [*bearer(*AT), (b"x-stainless-retry-count", str(retry).encode())]

        async def never(message: Any) -> None:
            await asyncio.Event().wait()

        return (await self.call(CHAT, body, headers, send=never if hold else None))[0]

    async def give_up(self, retry: int = 0, **body: Any) -> None:
        """The answer does not arrive."""
        rows = len(self.rows)
        task = asyncio.create_task(self.send(retry, hold=True, **body))
        while len(self.rows) == rows:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def counted(self) -> list[dict[str, Any]]:
        """The calls that count."""
        gone = {row["parent_id"] for row in self.rows if row["name"] == SUPERSEDED_SPAN}
        return [row for row in self.rows if row["name"] != SUPERSEDED_SPAN and row["span_id"] not in gone]


async def test_a_retry_leaves_a_row_that_names_the_span_in_whose_place_it_stands() -> None:
    client = Retrying()
    await client.give_up()
    assert await client.send(1) == 200
    first, again, second = client.rows
    assert (again["name"], again["parent_id"], again["status"]) == (SUPERSEDED_SPAN, first["span_id"], "OK")
    assert (again["rollout_id"], again["attempt_id"], again["trace_id"]) == (*AT, second["trace_id"])
    assert again["attributes"]["digest"] == first["attributes"]["digest"] == second["attributes"]["digest"]
    assert second["attributes"]["retry"] == 1 and "retry" not in first["attributes"]
    assert client.counted() == [second]


async def test_a_turn_counts_once_however_often_it_is_sent() -> None:
    client = Retrying()
    for retry in range(4):
        await client.give_up(retry)
    await client.send(4)
    assert [row["attributes"]["retry"] for row in client.counted()] == [4]


async def test_the_answer_that_was_given_up_goes_and_its_likes_stay() -> None:
    client = Retrying()
    await asyncio.gather(client.send(), client.send(), client.send())
    await client.give_up()
    await client.send(1)
    assert len(client.counted()) == 4 and len(client.rows) == 6
    assert all(row["span_id"] != client.rows[3]["span_id"] for row in client.counted())


async def test_other_requests_and_first_tries_supersede_nothing() -> None:
    client = Retrying()
    await client.give_up(n=1)
    await client.send(1, n=2)
    await client.send(0, n=1)
    assert len(client.counted()) == len(client.rows) == 3


async def test_a_call_that_ends_after_its_retry_began_counts_no_more() -> None:
    client = Retrying()
    slow = asyncio.create_task(client.send(delay=0.02))
    await asyncio.sleep(0.001)
    retry = asyncio.create_task(client.send(1, delay=0.02))
    assert await slow == await retry == 200
    assert [row["attributes"].get("retry") for row in client.counted()] == [1]


async def test_an_answer_that_was_an_error_was_given_up() -> None:
    """Its client sends it again, not the one like it that is still at work."""
    answered = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = len(client.calls)
        client.calls.append(number)
        async with sampling([number], [7]):
            if number == 0:
                await answered.wait()
        await respond(send, b"", status=500 if number == 1 else 200)

    client = Retrying(app)
    working = asyncio.create_task(client.send())
    await asyncio.sleep(0.001)
    assert await client.send() == 500
    assert await client.send(1) == 200
    answered.set()
    assert await working == 200
    assert sorted(row["prompt_ids"] for row in client.counted()) == [[0], [2]]


async def test_a_retry_of_a_call_that_was_refused_supersedes_no_other() -> None:
    client = Retrying(limits=Limits(calls_per_attempt=2))
    running = [asyncio.create_task(client.send(delay=0.02)) for _ in range(2)]
    await asyncio.sleep(0.001)
    assert await client.send(delay=0.02) == 429
    await asyncio.gather(*running)
    client.not_ready = "not yet"
    assert await client.send(1, delay=0.02) == 503
    client.not_ready = None
    assert await client.send(2, delay=0.02) == 200
    assert len(client.counted()) == len(client.rows) == 3


async def test_a_refused_retry_leaves_what_it_superseded_to_the_next() -> None:
    client = Retrying()
    await client.give_up()
    client.not_ready = "not yet"
    assert await client.send(1) == 503
    client.not_ready = None
    assert await client.send(2) == 200
    assert [row["attributes"]["retry"] for row in client.counted()] == [2]


async def test_a_call_that_could_not_be_stored_is_superseded_by_its_retry() -> None:
    client = Retrying()
    assert await client.send() == 200
    client.failure = InfrastructureError("store gone")
    assert await client.send() == 503
    client.failure = None
    assert await client.send(1) == 200
    assert len(client.counted()) == 2
