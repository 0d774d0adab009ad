"""What clients get is what vLLM's own server gives them, but for ids, times and where streams are cut."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.wire.cases import ANSWERED, PASSED, REFUSED, Case, full
from tests.e2e.wire.reference import Reference
from tests.e2e.wire.served import MODEL, Served
from tests.e2e.wire.streams import events, plain

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


async def both(served: Served, reference: Reference, path: str, body: dict[str, Any]) -> list[httpx.Response]:
    """The deployment's answer and that of vLLM's own server."""
    session = await served.attempt()
    async with httpx.AsyncClient(timeout=60) as client:
        return [await session.post(path, body), await client.post(reference.root + path, json=body)]


@named(ANSWERED)
async def test_an_answer_is_that_of_vllms_own_server(served: Served, reference: Reference, case: Case) -> None:
    ours, theirs = await both(served, reference, case.path, full(case, stream=False))
    assert (ours.status_code, theirs.status_code) == (200, 200), (ours.text, theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert plain(ours.json()) == plain(theirs.json())


@named(ANSWERED)
async def test_a_stream_is_that_of_vllms_own_server(served: Served, reference: Reference, case: Case) -> None:
    ours, theirs = await both(served, reference, case.path, full(case, stream=True))
    assert (ours.status_code, theirs.status_code) == (200, 200), (ours.text, theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert events(ours.text) == events(theirs.text)


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
