"""An image that was sent inline is kept once, and spans refer to it."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.capture.images import by_reference
from lightning_ray.errors import InfrastructureError
from lightning_ray.semconv import IMAGE_SPAN
from tests.capture_client import CHAT, Client, bearer

PICTURE = bytes(range(256))
INLINE = base64.b64encode(PICTURE).decode()
DIGEST = hashlib.sha256(PICTURE).hexdigest()
URL = f"data:image/png;base64,{INLINE}"
REFERENCE = f"image:sha256:{DIGEST};image/png;256"


def openai(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def anthropic(data: str, media_type: str = "image/png") -> dict[str, Any]:
    source = {"type": "base64", "media_type": media_type, "data": data}
    result = {"type": "tool_result", "content": [{"type": "image", "source": source}]}
    return {"messages": [{"role": "user", "content": [result]}]}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (openai(URL), openai(REFERENCE)),
        (anthropic(INLINE), anthropic(REFERENCE)),
        (
            {"input": [{"type": "input_image", "image_url": URL}]},
            {"input": [{"type": "input_image", "image_url": REFERENCE}]},
        ),
    ],
)
def test_an_inline_image_becomes_a_reference(sent: Any, kept: Any) -> None:
    before = repr(sent)
    body, [image] = by_reference(sent)
    assert body == kept and repr(sent) == before
    assert (image.sha256, image.media_type, image.data) == (DIGEST, "image/png", PICTURE)


@pytest.mark.parametrize(
    "sent",
    [
        openai("https://example.org/a.png"),
        openai("data:image/png;base64,"),
        openai("data:image/png;base64,!!"),
        openai("data:image/png;base64,YWJj\n"),
        openai("data:image/png;base64,é"),
        openai("data:image/svg+xml,<svg/>"),
        openai("data:text/plain;base64,YWJj"),
        anthropic(""),
        anthropic("not base64"),
        anthropic(INLINE, "application/pdf"),
        {"messages": [{"content": "the mark is base64"}], "n": 1, "x": None, "y": [True, 1.5]},
        {"type": "base64", "media_type": None, "data": None},
        {"type": "base64", "media_type": "image/png"},
    ],
)
def test_what_is_no_inline_image_stays(sent: Any) -> None:
    assert by_reference(sent) == (sent, [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just(URL),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "media_type", "data", "a"]), inner),
    max_leaves=20,
)


@given(VALUES)
def test_nothing_else_of_a_body_changes(value: Any) -> None:
    body, images = by_reference(value)
    assert repr(body).replace(REFERENCE, URL) == repr(value)
    assert len(images) == repr(value).count(URL)


async def test_an_attempt_keeps_an_image_once() -> None:
    client = Client()
    for body in (openai(URL), {**openai(URL), "n": 2}):
        await client.call(body=body)
    await client.call(CHAT, openai(URL), bearer("ro-1", "at-2"))
    images = [row for row in client.rows if row["name"] == IMAGE_SPAN]
    assert [row["attempt_id"] for row in images] == ["at-1", "at-2"]
    assert images[0]["attributes"] == {"sha256": DIGEST, "media_type": "image/png", "data": PICTURE}
    calls = [row["attributes"]["request"] for row in client.rows if row["name"] != IMAGE_SPAN]
    assert calls == [openai(REFERENCE), {**openai(REFERENCE), "n": 2}, openai(REFERENCE)]
    assert b"data:image" in client.app.bodies[0]


async def test_an_image_that_could_not_be_stored_is_stored_with_the_next_call() -> None:
    client = Client()
    client.failure = InfrastructureError("store gone")
    assert (await client.call(body=openai(URL)))[0] == 503
    client.failure = None
    await client.call(body=openai(URL))
    assert [row["name"] for row in client.rows] == [IMAGE_SPAN, "openai.chat.completion"]
