"""What clients get is what vLLM's own server gives them, chunk for chunk, but for ids and times."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.wire.cases import ANSWERED, PASSED, REFUSED, Case, full
from tests.e2e.wire.reference import Reference
from tests.e2e.wire.served import MODEL, Served

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]
OWN = ("id", "item_id", "call_id", "created", "created_at", "completed_at", "signature")
"""What differs from one answer of a server to the next."""


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def plain(value: Any) -> Any:
    """Without what is an answer's own."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: "its own" if key in OWN else plain(item) for key, item in value.items()}
    return value


def events(answer: httpx.Response) -> list[Any]:
    """A stream's events: their kind and data."""
    found = []
    for event in answer.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else plain(json.loads(data))))
    return found


async def both(served: Served, reference: Reference, path: str, body: dict[str, Any]) -> list[httpx.Response]:
    """The deployment's answer and that of vLLM's own server."""
    session = await served.attempt()
    async with httpx.AsyncClient(timeout=60) as client:
        return [await session.post(path, body), await client.post(reference.root + path, json=body)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@named(ANSWERED)
async def test_an_answer_is_that_of_vllms_own_server(
    served: Served, reference: Reference, case: Case, stream: bool
) -> None:
    ours, theirs = await both(served, reference, case.path, full(case, stream))
    assert (ours.status_code, theirs.status_code) == (200, 200), (ours.text, theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    if stream:
        assert events(ours) == events(theirs)
    else:
        assert plain(ours.json()) == plain(theirs.json())
    assert ours.headers["x-lightning-weight-version"] == "0"


@named(REFUSED)
async def test_a_refusal_is_that_of_vllms_own_server(served: Served, reference: Reference, case: Case) -> None:
    ours, theirs = await both(served, reference, case.path, {"model": MODEL, **case.body})
    assert (ours.status_code, plain(ours.json())) == (theirs.status_code, plain(theirs.json()))
    assert ours.status_code == (404 if case.name.endswith("-model") else 400)


@named(PASSED)
async def test_routes_that_sample_nothing_answer_as_vllms_own_server(
    served: Served, reference: Reference, case: Case
) -> None:
    ours, theirs = await both(served, reference, case.path, {"model": MODEL, **case.body})
    assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json()) and ours.status_code == 200
