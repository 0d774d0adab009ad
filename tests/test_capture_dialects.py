"""What the capture knows of each wire API."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ray.capture.dialects import DIALECTS
from lightning_ray.semconv import MODEL_CALL_NAMES

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    DIALECTS[path] for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
)
USER, MODEL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_each_has_a_name_for_its_spans() -> None:
    assert {dialect.api for dialect in DIALECTS.values()} == set(MODEL_CALL_NAMES)
    assert all(dialect.path == path for path, dialect in DIALECTS.items())


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], False),
        ([USER, MODEL, USER], True),
        ([MODEL], True),
        ([], False),
        (None, False),
        ("assistant", False),
        ([None, 3, "assistant", ["assistant"]], False),
        ([{"role": ["assistant"]}, {}], False),
        ({"role": "assistant"}, False),
    ],
)
def test_a_chat_continues_what_the_model_said(dialect: Any, messages: Any, expected: bool) -> None:
    assert dialect.continues({"messages": messages}) is expected
    assert dialect.continues({}) is False


@pytest.mark.parametrize(
    ("prompt", "expected"), [("once upon", True), ("", True), ([1, 2], False), ([[1]], False), (None, False)]
)
def test_a_completion_of_text_may_continue_and_ids_are_left_alone(prompt: Any, expected: bool) -> None:
    assert COMPLETIONS.continues({"prompt": prompt}) is expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input": "hi"}, False),
        ({"input": [USER]}, False),
        ({"input": [USER, MODEL]}, True),
        ({"input": [USER, {"type": "function_call", "name": "f"}]}, True),
        ({"input": [USER, {"type": "reasoning"}]}, True),
        ({"input": [USER, {"type": "message", "role": "user"}, None, 3]}, False),
        ({"input": "hi", "previous_response_id": "resp_1"}, True),
        ({"input": "hi", "previous_response_id": None}, False),
        ({}, False),
    ],
)
def test_a_response_continues_output_items_or_an_earlier_response(body: Any, expected: bool) -> None:
    assert RESPONSES.continues(body) is expected


@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS])
def test_beams_are_no_samples(dialect: Any) -> None:
    assert "use_beam_search" in dialect.refusal({"use_beam_search": True})
    assert dialect.refusal({"use_beam_search": False}) is None and dialect.refusal({}) is None


def test_an_answer_outside_of_its_call_cannot_be_captured() -> None:
    assert "background" in (RESPONSES.refusal({"background": True}) or "")
    assert RESPONSES.refusal({"background": False}) is None and MESSAGES.refusal({"background": True}) is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (408, "timeout_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (503, "api_error"),
    ],
)
def test_errors_are_said_as_the_clients_read_them(status: int, kind: str) -> None:
    for dialect in (CHAT, COMPLETIONS, RESPONSES):
        assert dialect.error(status, "why") == {
            "error": {"message": "why", "type": kind, "param": None, "code": status}
        }
    assert MESSAGES.error(status, "why") == {"type": "error", "error": {"type": kind, "message": "why"}}
