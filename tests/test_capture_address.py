"""Who is calling, by the address and the key of a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agent_names import to_header
from lightning_ray.capture.address import Address, Caller, Headers, identify, key_of
from lightning_ray.capture.audience import audience_of, relayed
from lightning_ray.capture.keys import Claims, KeyRefused, issue_key, operator_key

SECRET = b"s" * 32
CHAT = "/v1/chat/completions"
KEY = issue_key(SECRET, Claims("ro-1", "at-1", 9e9, {"temperature": 1.0})).encode()


def headers(agent: str | None = None, key: bytes = KEY) -> list[tuple[bytes, bytes]]:
    named = [] if agent is None else [(b"x-lightning-agent", to_header(agent).encode())]
    return [(b"accept", b"*/*"), (b"authorization", b"Bearer " + key), *named]


@pytest.mark.parametrize(
    ("path", "address"),
    [
        (CHAT, Address(CHAT)),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", Address(CHAT, "ro-1", "at-1")),
        (f"/rollout/ro-1/attempt/at-1/agent/planner{CHAT}", Address(CHAT, "ro-1", "at-1", "planner")),
        (f"/agent/planner{CHAT}", Address(CHAT, agent="planner")),
        ("/agent/a%2Fb%20%C3%BC/v1/models", Address("/v1/models", agent="a/b ü")),
        ("/agent/50%2520off/v1/models", Address("/v1/models", agent="50%20off")),
        ("/rollout/ro%2D1/attempt/at%2d1/v1/models", Address("/v1/models", "ro-1", "at-1")),
        ("/v1/chat%2Fcompletions", Address(CHAT)),
        ("/", Address("/")),
        ("", Address("")),
        ("v1/models", Address("v1/models")),
        ("/rollout/ro-1/attempt/at-1", Address("/rollout/ro-1/attempt/at-1")),
        ("/rollout/ro-1/attempt/at-1/", Address("/", "ro-1", "at-1")),
        ("/rollout/ro-1/attempt//v1/models", Address("/rollout/ro-1/attempt//v1/models")),
        ("/rollout//attempt/at-1/v1/models", Address("/rollout//attempt/at-1/v1/models")),
        ("/agent//v1/models", Address("/agent//v1/models")),
        ("/agent/planner", Address("/agent/planner")),
        ("/agent/a/agent/b/v1/models", Address("/agent/b/v1/models", agent="a")),
        ("/v1/models\n", Address("/v1/models\n")),
        ("/v1/models%0A", Address("/v1/models\n")),
        ("/agent/%FF/v1/models", Address("/v1/models", agent="\ufffd")),
    ],
)
def test_a_path_is_taken_apart(path: str, address: Address) -> None:
    assert Address.of(path) == address


@given(st.text())
def test_any_path_is_taken_apart(path: str) -> None:
    Address.of(path)


def test_the_key_alone_says_whose_the_call_is() -> None:
    assert identify(SECRET, Address(CHAT), headers()) == Caller("ro-1", "at-1", None, {"temperature": 1.0})


@pytest.mark.parametrize("address", [Address(CHAT, "ro-1", "at-1", "writer"), Address(CHAT, agent="writer")])
def test_the_agent_of_the_header_comes_before_that_of_the_path(address: Address) -> None:
    assert identify(SECRET, address, headers()).agent == "writer"
    assert identify(SECRET, address, headers("")).agent == "writer"
    assert identify(SECRET, address, headers("übersetzer / 50%")).agent == "übersetzer / 50%"
    assert identify(SECRET, Address(CHAT), headers("planner")).agent == "planner"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (Address(CHAT, "ro-1", "at-2"), "the key belongs to attempt at-1, not at-2"),
        (Address(CHAT, "ro-2", "at-1"), "the key belongs to attempt at-1"),
        (Address(CHAT, "", ""), "the key belongs to attempt at-1"),
    ],
)
def test_a_key_opens_no_other_attempt(address: Address, reason: str) -> None:
    with pytest.raises(KeyRefused, match=reason):
        identify(SECRET, address, headers())


@pytest.mark.parametrize("address", [Address(CHAT), Address(CHAT, "", ""), Address(CHAT, "ro-1", "at-1")])
def test_the_operators_key_opens_no_attempt(address: Address) -> None:
    with pytest.raises(KeyRefused, match="the operator's key opens no attempt"):
        identify(SECRET, address, headers(key=operator_key(SECRET, 60).encode()))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ([(b"authorization", b"Bearer abc")], "abc"),
        ([(b"authorization", b"bearer  abc ")], "abc"),
        ([(b"x-api-key", b" abc")], "abc"),
        ([(b"authorization", b"Basic abc"), (b"x-api-key", b"def")], "def"),
        ([(b"authorization", b"Bearer \xff")], "\xff"),
    ],
)
def test_a_key_comes_by_either_header(given: Headers, key: str) -> None:
    assert key_of(given) == key


@pytest.mark.parametrize("given", [[], [(b"authorization", b"Basic abc")], [(b"cookie", b"Bearer abc")]])
def test_a_request_without_a_key_is_told_how_to_send_it(given: Headers) -> None:
    with pytest.raises(KeyRefused, match="x-api-key"):
        key_of(given)


def test_a_key_of_another_endpoint_opens_nothing_here() -> None:
    judge = headers(key=issue_key(SECRET, Claims("ro-1", "at-1", 9e9, {}, relayed("judge"))).encode())
    address = Address.of(f"/rollout/ro-1/attempt/at-1{CHAT}")
    with pytest.raises(KeyRefused, match="the key opens 'relay:judge', not 'policy'; use the api_key of the resource"):
        identify(SECRET, address, judge)
    assert identify(SECRET, address, judge, relayed("judge")).attempt_id == "at-1"
    assert audience_of("http://h:1/relay/to/judge/v1") == "relay:judge" and audience_of("http://h:1/v1") == "policy"
