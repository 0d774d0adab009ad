"""Attempt keys open their own attempt until they expire, and nothing else."""

from __future__ import annotations

import base64

import msgpack
import pytest

from lightning_ray.capture.keys import Claims, KeyRefused, issue_key, open_key, open_operator_key, operator_key

SECRET = b"s" * 32
CLAIMS = Claims("ro-1", "at-1", 1000.0, {"temperature": 1.0, "top_k": 0})


def test_a_key_gives_back_its_claims_until_it_expires() -> None:
    key = issue_key(SECRET, CLAIMS)
    assert open_key(SECRET, key, now=1000.0) == CLAIMS
    with pytest.raises(KeyRefused, match="at-1 has expired"):
        open_key(SECRET, key, now=1000.1)


def test_the_present_time_counts_when_none_is_given() -> None:
    with pytest.raises(KeyRefused, match="expired"):
        open_key(SECRET, issue_key(SECRET, CLAIMS))


def test_a_key_fits_into_a_header() -> None:
    key = issue_key(SECRET, Claims("ro-ü", "at-1", 1000.0))
    assert key.isascii() and not set(key) & set(" \r\n=+/,;")


def test_another_secret_opens_nothing() -> None:
    with pytest.raises(KeyRefused, match="another run"):
        open_key(b"t" * 32, issue_key(SECRET, CLAIMS), now=0.0)


def test_claims_cannot_be_exchanged_under_a_signature() -> None:
    prefix, _, signature = issue_key(SECRET, CLAIMS).split(".")
    stolen = msgpack.packb(["ro-2", "at-2", 9e9, {}])
    body = base64.urlsafe_b64encode(stolen).rstrip(b"=").decode()
    with pytest.raises(KeyRefused, match="signature"):
        open_key(SECRET, f"{prefix}.{body}.{signature}", now=0.0)


def test_no_bit_of_the_claims_can_be_flipped() -> None:
    prefix, body, signature = issue_key(SECRET, CLAIMS).split(".")
    raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        text = base64.urlsafe_b64encode(changed).rstrip(b"=").decode()
        with pytest.raises(KeyRefused):
            open_key(SECRET, f"{prefix}.{text}.{signature}", now=0.0)


@pytest.mark.parametrize(
    "key", ["", "sk-abc", "lr1", "lr1.", "lr1..", "lr1.abc", "lr2.YWJj.YWJj", "lr1.é.é", "lr1.a.a"]
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(KeyRefused):
        open_key(SECRET, key, now=0.0)


def test_the_operators_key_opens_the_status_for_a_while() -> None:
    key = operator_key(SECRET, 60.0, now=1000.0)
    open_operator_key(SECRET, key, now=1060.0)
    with pytest.raises(KeyRefused, match="the operator's key has expired"):
        open_operator_key(SECRET, key, now=1060.1)
    with pytest.raises(KeyRefused, match="another run"):
        open_operator_key(b"t" * 32, key, now=1000.0)
    with pytest.raises(KeyRefused, match="the key is an attempt's"):
        open_operator_key(SECRET, issue_key(SECRET, CLAIMS), now=0.0)
