"""Reports over HTTP: into the right attempt's trace, and refused in plain words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.programs import report
from lightning_ray.programs.report import Reports, ReportServer, report_servers
from lightning_ray.tracing import AttemptTrace, traced
from tests.command_agents import play, python

POST = """
import json, os, sys, urllib.request
def post(path, body):
    request = urllib.request.Request(os.environ['LIGHTNING_REPORT_URL'] + path, json.dumps(body).encode(),
        {'Authorization': 'Bearer ' + os.environ['LIGHTNING_REPORT_TOKEN']})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 204
"""


@pytest.mark.parametrize("way", ["auto", "http"])
async def test_a_reward_over_http(way: Any) -> None:
    played = await play(python(POST + "post('/reward', {'reward': 0.5}); sys.exit(2)", reward=way))
    assert played.result is None and played.rewards == [0.5]


async def test_everything_lands_under_its_programs_span_in_its_own_trace() -> None:
    code = "n = int(sys.argv[1])\nfor i in range(3): post('/annotation', {'n': n, 'at': {'i': i}})"
    agent = python(
        f"{POST}{code}\npost('/message', {{'message': 'hi', 'n': n}}); post('/reward', {{'reward': n}})", "{task}"
    )
    played = await asyncio.gather(*(play(agent, n, number=n) for n in range(12)))
    for number, one in enumerate(played):
        assert one.rewards == [number]
        *reported, program = one.trace.spans
        assert [row["attributes"].get("at.i") for row in reported] == [0, 1, 2, None, None]
        assert {row["attributes"].get("n", number) for row in reported} == {number}
        assert {row["parent_id"] for row in reported} == {program["span_id"]}
        assert reported[3]["attributes"]["agentlightning.message.body"] == "hi"


async def test_several_dimensions() -> None:
    body = "{'reward': {'speed': 1, 'f1': 0.5}, 'primary': 'f1'}"
    assert (await play(python(f"{POST}post('/reward', {body})"))).rewards == [0.5]
    assert (await play(python(f"{POST}post('/reward', {{'f1': 1, 'reward': 0.25}})"))).rewards == [0.25]


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[ReportServer, Reports, AttemptTrace]]:
    trace = AttemptTrace("ro-1", "at-1")
    server = report_servers.here()
    with traced(trace):
        reports = Reports(None)
        with server.hearing(reports):
            yield server, reports, trace


async def ask(server: ReportServer, raw: bytes) -> tuple[int, str]:
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, text = answer.partition("\r\n\r\n")
    return int(head.split()[1]), text


async def post(server: ReportServer, path: str, body: Any, headers: Mapping[str, str], method: str = "POST") -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Length": str(len(raw)), **headers}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    return await ask(server, head.encode() + b"\r\n" + raw)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/reward", {"reward": 0.5}, 204, ""),
        ("/reward/?x=1", {"reward": True}, 204, ""),
        ("/reward", {"score": 0.5}, 400, "a reward is {\"reward\": 0.5}; the keys are ['score']"),
        ("/reward", {"reward": "good"}, 400, "must be a number, got str 'good'"),
        ("/reward", {"reward": {"a": 1, "b": 2}}, 400, "say which is trained on"),
        ("/reward", {"reward": {"a": 1}, "primary": "b"}, 400, "'b' is not among the reward's ['a']"),
        ("/reward", b'{"reward": NaN}', 400, "must be finite"),
        ("/reward", b"0.5", 400, "must be a JSON object, got '0.5'"),
        ("/reward", b"{", 400, "the body is no JSON"),
        ("/reward", b"\xff", 400, "the body is no JSON"),
        ("/message", {"message": 5}, 400, "a message is text, got int 5"),
        ("/message", {"text": "x"}, 400, "the keys are ['text']"),
        ("/annotation", {"a": None}, 400, ""),
        ("/rewards", {"reward": 0.5}, 404, "no route /rewards; POST to /reward, /annotation, /message"),
    ],
)
async def test_what_is_said_to_a_report(path: str, body: Any, status: int, said: str) -> None:
    async with listening() as (server, reports, trace):
        given = await post(server, path, body, {"Authorization": f"Bearer {reports.token}"})
        assert given[0] == status and said in given[1]
        assert len(trace.spans) == reports.rewards == (status == 204)


async def test_only_the_attempts_own_token_opens_it() -> None:
    async with listening() as (server, reports, trace):
        for headers, said in [
            ({}, "send the header 'Authorization: Bearer'"),
            ({"Authorization": "Basic x"}, "send the header"),
            ({"Authorization": f"Bearer {reports.token}x"}, "it is wrong, or the attempt has ended"),
        ]:
            status, text = await post(server, "/reward", {"reward": 1}, headers)
            assert status == 401 and said in text and not trace.spans
    status, text = await post(server, "/reward", {"reward": 1}, {"Authorization": f"Bearer {reports.token}"})
    assert status == 401 and not trace.spans


async def test_what_is_no_proper_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "READ_SECONDS", 0.2)
    async with listening() as (server, reports, _):
        own = {"Authorization": f"Bearer {reports.token}"}
        assert (await post(server, "/reward", {}, own, "GET"))[0] == 405
        assert (await post(server, "/reward", {}, {**own, "Content-Length": "x"}))[0] == 411
        status, text = await post(server, "/message", {"message": "x" * 2**20}, own)
        assert status == 413 and "1048576 are allowed" in text
        assert (await post(server, "/reward", {}, {**own, "X-Long": "x" * 20_000}))[0] == 413
        assert (await post(server, "/reward", {}, {**own, "Content-Length": "100"}))[0] == 408
        assert (await ask(server, b"POST /reward HTTP/1.1\r\n"))[0] == 408


async def test_a_client_that_waits_to_be_told_to_go_on() -> None:
    async with listening() as (server, reports, _):
        lines = [f"Authorization: bearer {reports.token}", "Content-Length: 12", "Expect: 100-continue"]
        head = "\r\n".join(["POST /reward HTTP/1.1", *lines, "", ""])
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b'{"reward":1}')
        assert (await reader.read()).startswith(b"HTTP/1.1 204") and reports.rewards == 1
        writer.close()


async def test_a_client_that_hangs_up_hurts_nobody() -> None:
    async with listening() as (server, reports, _):
        host, port = server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /rew")
        writer.close()
        assert (await post(server, "/reward", {"reward": 1}, {"Authorization": f"Bearer {reports.token}"}))[0] == 204


async def test_a_reward_is_asked_for_if_the_program_sent_only_a_wrong_one() -> None:
    code = POST + "\ntry: post('/reward', {'reward': 'x'})\nexcept Exception as error: print(error)"
    with pytest.raises(lr.AgentError, match="gave no reward"):
        await play(python(code))
