"""Who is calling: the rollout, attempt and agent of a request, from its address and its key.

    /rollout/{rollout_id}/attempt/{attempt_id}[/agent/{name}]/v1/...    the address of an attempt
    [/agent/{name}]/v1/...                                              the key alone, for clients that allow no path

The key opens its own attempt and nothing else. The agent's name comes from the header ``x-lightning-agent``,
otherwise from the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from lightning_ray.agent_names import AGENT_HEADER, from_header
from lightning_ray.capture.audience import POLICY
from lightning_ray.capture.keys import Claims, KeyRefused, open_key

_ADDRESS = re.compile(
    r"(?:/rollout/(?P<rollout>[^/]+)/attempt/(?P<attempt>[^/]+))?(?:/agent/(?P<agent>[^/]+))?(?P<path>/.*)"
)
Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Caller:
    """One attempt, the agent of it that calls (if it says), and the sampling parameters its key fixes."""

    rollout_id: str
    attempt_id: str
    agent: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Address:
    """A request's path, taken apart and decoded."""

    path: str
    """What the app behind the edge is asked for."""
    rollout_id: str | None = None
    attempt_id: str | None = None
    agent: str | None = None

    @classmethod
    def of(cls, path: str) -> Address:
        """Of any path as it was sent, percent-encoded: what an agent is called may have slashes."""
        found = _ADDRESS.fullmatch(path)
        if found is None:
            return cls(unquote(path))
        parts = {name: None if part is None else unquote(part) for name, part in found.groupdict().items()}
        return cls(unquote(found["path"]), parts["rollout"], parts["attempt"], parts["agent"])


def identify(secret: bytes, address: Address, headers: Headers, audience: str = POLICY) -> Caller:
    """Who calls the endpoint ``audience``. Raises KeyRefused, with the reason, for a key that does not open it."""
    claims = open_key(secret, key_of(headers))
    if not claims.attempt_id:
        raise KeyRefused("the operator's key opens no attempt")
    if claims.audience != audience:
        raise KeyRefused(f"the key opens {claims.audience!r}, not {audience!r}; use the api_key of the resource called")
    if address.rollout_id is not None and not _opens(claims, address):
        raise KeyRefused(f"the key belongs to attempt {claims.attempt_id}, not {address.attempt_id}")
    return Caller(claims.rollout_id, claims.attempt_id, _header_agent(headers) or address.agent, claims.sampling)


def key_of(headers: Headers) -> str:
    """The key a client sent, by ``Authorization: Bearer`` (OpenAI) or ``x-api-key`` (Anthropic)."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].decode("latin-1").strip()
        if name == b"x-api-key":
            return value.decode("latin-1").strip()
    raise KeyRefused("no key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")


def _opens(claims: Claims, address: Address) -> bool:
    return (claims.rollout_id, claims.attempt_id) == (address.rollout_id, address.attempt_id)


def _header_agent(headers: Headers) -> str | None:
    wanted = AGENT_HEADER.encode()
    for name, value in headers:
        if name == wanted and value:
            return from_header(value.decode("latin-1"))
    return None
