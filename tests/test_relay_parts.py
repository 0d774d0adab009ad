"""The relay's parts by themselves: settings, limits, usage, events, pauses, what was spent before."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lightning_ray.errors import ConfigError
from lightning_ray.relay.app import RelayApp
from lightning_ray.relay.limits import Bucket, Limiter, TooBusy
from lightning_ray.relay.reading import Events, Reading
from lightning_ray.relay.redaction import Redaction
from lightning_ray.relay.restoring import spent_before
from lightning_ray.relay.retrying import LONGEST_PAUSE, asked_for, may_pass, pause
from lightning_ray.relay.settings import Upstream, check_upstreams
from lightning_ray.relay.spend import Usage
from lightning_ray.store.client import LocalStoreClient
from lightning_ray.store.core import SpanStore
from lightning_ray.store.schema import spans_to_batch
from tests.relay_parts import SECRET, Relayed, ask

HERE = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("kind", "base", "path", "url"),
    [
        ("openai", "https://a/v1", "/v1/chat/completions", "https://a/v1/chat/completions"),
        ("openai", "https://a/v1beta/openai/", "/v1/chat/completions", "https://a/v1beta/openai/chat/completions"),
        ("openai", "http://a:8000/v1", "/tokenize", "http://a:8000/tokenize"),
        ("openai", "http://a:8000/v1", "/v1/messages", "http://a:8000/v1/messages"),
        ("anthropic", "https://a", "/v1/messages", "https://a/v1/messages"),
        ("anthropic", "https://a/v1", "/v1/messages/count_tokens", "https://a/v1/messages/count_tokens"),
    ],
)
def test_where_a_route_is(kind: Any, base: str, path: str, url: str) -> None:
    assert Upstream(base_url=base, kind=kind).url(path) == url


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"base_url": "a.example/v1"}, "begins with http"),
        ({"base_url": "https://user:hunter2@a/v1"}, "no user"),
        ({"base_url": HERE, "max_spend": 1}, "max_spend needs price"),
        ({"base_url": HERE, "modell": "x"}, "modell"),
        ({"base_url": HERE, "max_concurrent": 0}, "max_concurrent"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason) as caught:
        Upstream(**settings)
    assert "hunter2" not in str(caught.value)


def test_names_that_cannot_be() -> None:
    check_upstreams({"judge-2.b_c": Upstream(base_url=HERE)})
    for name in ("main_llm", "a/b", "", "ä"):
        with pytest.raises(ConfigError, match="a name has letters"):
            check_upstreams({name: Upstream(base_url=HERE)})
    with pytest.raises(ConfigError, match="relay 'judge' is str"):
        check_upstreams({"judge": "http://x"})  # type: ignore[dict-item]


def test_usage_of_the_wire_apis() -> None:
    openai = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    assert Usage.of(openai) == Usage(10, 5, 4)
    responses = {"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4}}
    assert Usage.of(responses) == Usage(10, 5, 4)
    anthropic = {
        "input_tokens": 3,
        "cache_creation_input_tokens": 3,
        "cache_read_input_tokens": 4,
        "output_tokens": 5,
    }
    assert Usage.of(anthropic) == Usage(10, 5, 4)
    assert Usage.of({"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 4}) == Usage(10, 5, 4)
    assert Usage.of({"prompt_tokens": None}) is None
    upstream = Upstream(base_url=HERE, price_input_per_million=1e6, price_cached_input_per_million=1e5)
    assert Usage(10, 5, 4).cost(upstream) == pytest.approx(6.4)


def test_events_are_cut_where_they_end() -> None:
    events = Events(lambda raw: raw)
    assert [event.raw for event in events.feed(b"data: 1\r\n\r\nda")] == [b"data: 1\r\n\r\n"]
    [event] = events.feed(b'ta: {"a":\ndata: 1}\n\n: ping')
    assert event.data == {"a": 1} and not event.is_last
    assert events.feed(b"\n") == []
    ping, done = events.feed(b"\ndata: [DONE]\n\nrest")
    assert ping.raw == b": ping\n\n" and ping.data is None and done.is_last
    assert events.rest == b"rest"


def test_a_large_event_that_comes_in_pieces_is_not_searched_again_and_again() -> None:
    events, began = Events(lambda raw: raw), time.process_time()
    for _ in range(2000):
        events.feed(b"x" * 100)
    assert len(events.feed(b"\n\n")) == 1
    assert time.process_time() - began < 1.0


def test_an_answer_in_an_unknown_shape_is_no_defect() -> None:
    reading = Reading("messages")
    events = Events(lambda raw: raw)
    for event in events.feed(b'data: {"type": "message_start"}\n\ndata: [1]\n\ndata: {"type": "message_stop"}\n\n'):
        reading.add(event)
    assert reading.is_whole and reading.usage is None
    plain = Reading("chat")
    plain.whole(b'{"choices": "none", "usage": 3}', 200)
    assert plain.finish_reason is None and plain.usage is None and plain.error is None
    nothing = Reading("chat")
    nothing.whole(b"<html>", 200)
    assert nothing.error is not None


def test_an_error_amid_a_stream_is_told() -> None:
    for api, raw in (
        ("chat", b'data: {"error": {"message": "overloaded"}}\n\n'),
        ("messages", b'event: error\ndata: {"type": "error", "error": {"message": "overloaded"}}\n\n'),
        ("responses", b'data: {"type": "response.failed", "response": {"error": {"message": "overloaded"}}}\n\n'),
    ):
        reading = Reading(api)
        for event in Events(lambda raw: raw).feed(raw):
            reading.add(event)
        assert reading.error == "overloaded", api


def test_secrets_become_stars_of_their_length() -> None:
    clean = Redaction(["Bearer abcdefgh1", "short"]).clean
    assert clean(b"x abcdefgh1 short Bearer abcdefgh1") == b"x ********* short " + b"*" * 16


def test_pauses() -> None:
    assert asked_for({"retry-after": "3"}) == 3 and asked_for({"retry-after-ms": "250"}) == 0.25
    assert asked_for({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0 and asked_for({"retry-after": "x"}) is None
    assert 3 <= pause(9, {"retry-after": "3"}) <= 4
    assert 0.25 <= pause(0, {}) <= 0.5 and LONGEST_PAUSE / 2 <= pause(50, {}) <= LONGEST_PAUSE
    assert [may_pass(status, {}) for status in (200, 400, 404, 429, 500, 529)] == [False] * 3 + [True] * 3
    assert may_pass(400, {"x-should-retry": "true"}) and not may_pass(500, {"x-should-retry": "false"})


async def test_a_bucket_gives_what_its_rate_allows() -> None:
    bucket, began = Bucket(600), time.monotonic()  # ten a second, fifty at once
    for _ in range(55):
        await bucket.take(1)
    assert 0.4 < time.monotonic() - began < 5
    bucket.give(-2)
    began = time.monotonic()
    await bucket.take(1)
    assert 0.2 < time.monotonic() - began < 5


async def test_tokens_that_were_not_used_are_given_back() -> None:
    limiter, began = Limiter(Upstream(base_url=HERE, tokens_per_minute=60_000, wait_seconds=5)), time.monotonic()
    for _ in range(20):  # each may take all that may be used at once, and takes little
        async with limiter.slot(5_000, lambda: 10):
            pass
    assert time.monotonic() - began < 1.0


async def test_a_call_that_gives_up_waiting_leaves_its_place() -> None:
    limiter = Limiter(Upstream(base_url=HERE, max_concurrent=1, tokens_per_minute=60, wait_seconds=0.1))
    async with limiter.slot(5, lambda: None):
        with pytest.raises(TooBusy):
            async with limiter.slot(1, lambda: None):
                pass
        assert (limiter.running, limiter.waiting) == (1, 0)
    with pytest.raises(TooBusy):  # the place is free, the tokens are not
        async with limiter.slot(5, lambda: None):
            pass
    async with asyncio.timeout(3):
        while True:
            try:
                async with limiter.slot(1, lambda: 1):
                    break
            except TooBusy:
                continue
    assert (limiter.running, limiter.waiting) == (0, 0)


async def test_requests_a_minute_hold_for_retries_too() -> None:
    limiter, began = Limiter(Upstream(base_url=HERE, requests_per_minute=120)), time.monotonic()
    for _ in range(12):
        await limiter.request()
    assert 0.8 < time.monotonic() - began < 2.0


async def test_what_was_spent_is_known_after_a_restart(tmp_path: Path) -> None:
    store = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    rollout = await store.start_rollout({"question": 1})
    attempt = rollout.attempt.attempt_id

    async def append(rows: list[dict[str, Any]]) -> None:
        rows = [{**row, "rollout_id": rollout.rollout_id, "attempt_id": attempt} for row in rows]
        await store.append_spans(spans_to_batch(rows))

    relayed = Relayed()
    relayed.append = append  # type: ignore[method-assign]
    await relayed.start(max_spend=0.0003)
    await relayed.client().chat.completions.create(**ask())
    await relayed.client(upstream="claude").chat.completions.create(**ask())
    before = relayed.app.forwarders["judge"].spend
    again = RelayApp(
        {"judge": relayed.app.forwarders["judge"].upstream}, SECRET, append, restore=lambda: spent_before(store)
    )
    status = (await again.status())["judge"]
    assert status["money"] == pytest.approx(before.money) and status["prompt_tokens"] == 100
    assert (status["calls"], status["errors"]) == (1, 0)
    assert again.forwarders["judge"].spend.money >= 0.0003
    await relayed.stop()
    await store.close()


async def test_an_unreadable_past_is_no_reason_to_spend(tmp_path: Path) -> None:
    tries = 0

    async def restore() -> dict[str, Any]:
        nonlocal tries
        tries += 1
        raise RuntimeError("the store is away")

    app = RelayApp({"judge": Upstream(base_url=HERE)}, SECRET, _nowhere, restore=restore)
    for _ in range(2):
        assert "the store is away" in str(await app._ready())
    assert tries == 2


async def _nowhere(rows: list[dict[str, Any]]) -> None:
    raise AssertionError(rows)
