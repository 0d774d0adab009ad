"""Attempt keys: what opens one attempt's routes, and nothing else.

A key is ``lr1.<claims>.<signature>``: msgpack claims and a truncated HMAC-SHA256 over them, both url-safe base64.
It is handed to the agent as its API key. Verification needs the run's secret and no look-up. The
claims carry the sampling parameters that the algorithm fixed, so that an agent cannot change them by accident.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgpack

from lightning_ray.capture.audience import POLICY

PREFIX = "lr1"
SIGNATURE_BYTES = 16
KEYS_KNOWN = 10_000


class KeyRefused(Exception):
    """The key does not open the route; the message says why."""


@dataclass(frozen=True)
class Claims:
    """Whose key it is and until when (Unix seconds)."""

    rollout_id: str
    attempt_id: str
    expires: float
    sampling: dict[str, Any] = field(default_factory=dict)
    audience: str = POLICY
    """The endpoint it opens: the policy, or one that is relayed."""


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _sign(secret: bytes, payload: bytes) -> bytes:
    return hmac.new(secret, payload, hashlib.sha256).digest()[:SIGNATURE_BYTES]


def issue_key(secret: bytes, claims: Claims) -> str:
    """The API key of one attempt."""
    payload: bytes = msgpack.packb(
        [claims.rollout_id, claims.attempt_id, claims.expires, claims.sampling, claims.audience]
    )
    return f"{PREFIX}.{_encode(payload)}.{_encode(_sign(secret, payload))}"


def operator_key(secret: bytes, seconds: float, now: float | None = None) -> str:
    """A key that opens no attempt, but the status of a replica or relay, for so long."""
    return issue_key(secret, Claims("", "", (time.time() if now is None else now) + seconds))


def open_operator_key(secret: bytes, key: str, now: float | None = None) -> None:
    """Raises KeyRefused if it is not the operator's."""
    if open_key(secret, key, now).attempt_id:
        raise KeyRefused("the key is an attempt's; the status is for the operator's")


def open_key(secret: bytes, key: str, now: float | None = None) -> Claims:
    """Verify a key and return its claims. Raises KeyRefused with the reason."""
    claims = _signed(secret, key)
    if (time.time() if now is None else now) > claims.expires:
        whose = f"the key of attempt {claims.attempt_id}" if claims.attempt_id else "the operator's key"
        raise KeyRefused(f"{whose} has expired")
    return claims


@lru_cache(maxsize=KEYS_KNOWN)
def _signed(secret: bytes, key: str) -> Claims:
    """The claims of a key that was signed by the secret's holder; verified once, as an attempt calls many times."""
    prefix, _, rest = key.partition(".")
    body, _, signature = rest.partition(".")
    if prefix != PREFIX or not body or not signature:
        raise KeyRefused("not a lightning-ray attempt key")
    try:
        payload, given = _decode(body), _decode(signature)
    except ValueError as error:
        raise KeyRefused("the key is damaged") from error
    if not hmac.compare_digest(given, _sign(secret, payload)):
        raise KeyRefused("the key's signature is wrong: it belongs to another run or was changed")
    rollout_id, attempt_id, expires, sampling, audience = msgpack.unpackb(payload)
    return Claims(rollout_id, attempt_id, expires, sampling, audience)
