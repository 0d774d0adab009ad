"""The store over HTTP: who may call, what is refused and how, 0.3's conversation word for word, OTLP, resends."""

from __future__ import annotations

import asyncio
import gzip
import json
import pickle
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pyarrow as pa
import pytest
from google.rpc.status_pb2 import Status as RpcStatus
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Link, Status, StatusCode

from lightning_ray.errors import ConfigError, InfrastructureError, StoreError
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.store.base import Finish
from lightning_ray.store.http.app import StoreApi
from lightning_ray.store.http.client import HttpStoreClient
from lightning_ray.store.http.media import ARROW
from lightning_ray.store.http.server import serve
from lightning_ray.store.schema import SPAN_SCHEMA, encode_table, spans_to_batch
from lightning_ray.types import AttemptedRollout, EnqueueRolloutRequest, PromptTemplate, Span

TOKEN = "a-token"
LIMIT = 100_000
AGL = "/v1/agl"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalStoreClient]:
    store = LocalStoreClient(SpanStore(tmp_path / "store", fsync="none"))
    yield store
    await store.close()


@pytest.fixture
async def address(store: LocalStoreClient) -> AsyncIterator[str]:
    async with serve(store, token=TOKEN, max_body_bytes=LIMIT) as address:
        yield address


@pytest.fixture
async def http(address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30) as http:
        yield http


@pytest.fixture
async def client(address: str) -> AsyncIterator[HttpStoreClient]:
    client = HttpStoreClient(address, TOKEN, deadline=20)
    yield client
    await client.close()


@pytest.fixture
async def claim(store: LocalStoreClient) -> AttemptedRollout:
    await store.enqueue_rollout({"question": 1})
    claim = await store.dequeue_rollout("w")
    assert claim is not None
    return claim


def span_of(claim: AttemptedRollout, **fields: Any) -> Span:
    return Span.from_attributes(
        attributes={"x": 1}, rollout_id=claim.rollout_id, attempt_id=claim.attempt.attempt_id, **fields
    )


class TestTheDoor:
    @pytest.mark.parametrize("header", [None, "Bearer wrong", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
    async def test_is_closed_without_the_token(self, address: str, header: str | None) -> None:
        headers = {} if header is None else {"Authorization": header}
        async with httpx.AsyncClient(base_url=address, headers=headers) as http:
            for path in ("/v1/agl/statistics", "/v1/agl/nothing", "/"):
                answer = await http.get(path)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert "token" in answer.json()["detail"]
            assert (await http.post("/v1/traces")).status_code == 401

    async def test_health_is_open(self, address: str) -> None:
        async with httpx.AsyncClient(base_url=address) as http:
            assert (await http.get(f"{AGL}/health")).json() == {"status": "ok"}

    def test_nothing_is_served_without_a_token(self, store: LocalStoreClient) -> None:
        with pytest.raises(StoreError, match="token"):
            StoreApi(store, "")

    async def test_a_taken_port_is_named(self, store: LocalStoreClient, address: str) -> None:
        port = int(address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=str(port)):
            async with serve(store, port=port, token=TOKEN):
                pass


class TestRefusals:
    async def test_unknown_paths_and_methods(self, http: httpx.AsyncClient) -> None:
        assert (await http.get("/v1/agl/nothing")).status_code == 404
        wrong = await http.put(f"{AGL}/rollouts")
        assert wrong.status_code == 405 and "PUT /v1/agl/rollouts" in wrong.json()["detail"]

    @pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 5000])
    async def test_a_body_that_is_no_json(self, http: httpx.AsyncClient, body: bytes) -> None:
        answer = await http.post(f"{AGL}/rollouts", content=body)
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith("the body is not application/json")

    @pytest.mark.parametrize(
        ("path", "body", "named"),
        [
            ("rollouts", {}, "input: Field required"),
            ("rollouts", {"input": 1, "mode": "fast"}, "mode"),
            ("rollouts", {"input": 1, "config": {"max_attempts": 0}}, "config.max_attempts"),
            ("rollouts", {"input": 1, "colour": "red"}, "colour"),
            ("queues/rollouts/enqueue", {"rollouts": [{"input": 1}, {}]}, "rollouts.1.input"),
            ("queues/rollouts/enqueue", [], "valid dictionary"),
            ("queues/rollouts/dequeue", {"limit": "many"}, "limit"),
            ("spans", {"name": "n"}, "rollout_id: Field required; attempt_id: Field required"),
            ("spans", [{"name": "n"}], "0.rollout_id"),
            ("spans", 7, "valid dictionary"),
            ("spans/next", {"rollout_id": "r"}, "attempt_id"),
            ("spans/search", {}, "rollout_id"),
            ("resources", {"llm": {"resource_type": "llm"}}, "endpoint"),
            ("resources", None, "valid dictionary"),
            ("waits/rollouts", {"rollout_ids": "r"}, "rollout_ids"),
            ("attempts/finish", {"finishes": [{"rollout_id": "r"}]}, "finishes.0.attempt_id"),
            ("sql", {}, "query"),
        ],
    )
    async def test_what_is_missing_or_wrong_is_named(
        self, http: httpx.AsyncClient, path: str, body: Any, named: str
    ) -> None:
        answer = await http.post(f"{AGL}/{path}", json=body)
        assert answer.status_code == 422
        assert named in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("query", "named"),
        [
            ({"sort_by": "colour"}, "sort_by"),
            ({"limit": 0}, "limit"),
            ({"limit": -2}, "limit"),
            ({"offset": -1}, "offset"),
        ],
    )
    async def test_a_page_that_cannot_be(self, http: httpx.AsyncClient, query: dict[str, Any], named: str) -> None:
        for answer in (
            await http.get(f"{AGL}/rollouts", params=query),
            await http.post(f"{AGL}/workers/search", json=query),
        ):
            assert answer.status_code == 400
            assert answer.json()["detail"].startswith(named)

    async def test_unknown_ids_are_404(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        rollout = f"{AGL}/rollouts/{claim.rollout_id}"
        stray = span_of(claim).model_dump(mode="json") | {"attempt_id": "at-0"}
        for answer in (
            await http.post(f"{AGL}/rollouts/ro-0", json={"status": "cancelled"}),
            await http.post(f"{AGL}/rollouts/ro-0/attempts"),
            await http.get(f"{AGL}/rollouts/ro-0/attempts"),
            await http.get(f"{AGL}/rollouts/ro-0/attempts/latest"),
            await http.post(f"{rollout}/attempts/at-0", json={"status": "failed"}),
            await http.post(f"{rollout}", json={"resources_id": "rs-0"}),
            await http.post(f"{AGL}/rollouts", json={"input": 1, "resources_id": "rs-0"}),
            await http.post(
                f"{AGL}/queues/rollouts/enqueue", json={"rollouts": [{"input": 1, "resources_id": "rs-0"}]}
            ),
            await http.post(f"{AGL}/spans", json=stray),
            await http.post(f"{AGL}/spans", json=[stray]),
            await http.post(f"{AGL}/spans/next", json={"rollout_id": "ro-0", "attempt_id": "at-0"}),
            await http.post(f"{AGL}/spans/search", json={"rollout_id": "ro-0"}),
            await http.post(f"{AGL}/waits/rollouts", json={"rollout_ids": ["ro-0"], "timeout": 0}),
        ):
            assert answer.status_code == 404, answer.request.url
            assert any(name in answer.json()["detail"] for name in ("ro-0", "at-0", "rs-0"))

    async def test_what_the_store_refuses_as_it_stands_is_409(
        self, http: httpx.AsyncClient, store: LocalStoreClient, claim: AttemptedRollout
    ) -> None:
        await store.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, "succeeded")
        answer = await http.post(f"{AGL}/rollouts/{claim.rollout_id}/attempts")
        assert answer.status_code == 409
        assert "ended" in answer.json()["detail"]

    async def test_nulls_where_there_must_be_a_value(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        rollout = f"{AGL}/rollouts/{claim.rollout_id}"
        for path, field in ((rollout, "status"), (rollout, "config"), (f"{rollout}/attempts/latest", "worker_id")):
            answer = await http.post(path, json={field: None})
            assert (answer.status_code, answer.json()["detail"].partition(":")[0]) == (400, field)

    async def test_large_bodies(self, http: httpx.AsyncClient) -> None:
        large, path = json.dumps({"input": "x" * LIMIT}).encode(), f"{AGL}/rollouts"
        assert (await http.post(path, content=large)).status_code == 413

        async def piecemeal() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 10_000):
                yield large[start : start + 10_000]

        assert (await http.post(path, content=piecemeal())).status_code == 413
        answer = await http.post(path, content=gzip.compress(large), headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 413 and "unzipped" in answer.json()["detail"]

    async def test_gzip(self, http: httpx.AsyncClient) -> None:
        headers, body = {"Content-Encoding": "gzip"}, json.dumps({"input": "y"}).encode()
        two_members = gzip.compress(body[:5]) + gzip.compress(body[5:])
        for content in (gzip.compress(body), two_members):
            assert (await http.post(f"{AGL}/rollouts", content=content, headers=headers)).status_code == 201
        for content in (body, gzip.compress(body)[:-5]):
            assert (await http.post(f"{AGL}/rollouts", content=content, headers=headers)).status_code == 400
        answer = await http.post(f"{AGL}/rollouts", content=body, headers={"Content-Encoding": "br"})
        assert answer.status_code == 415

    async def test_a_bomb_is_refused_before_it_grows(self, http: httpx.AsyncClient) -> None:
        bomb = gzip.compress(bytes(50 * 2**20))
        assert len(bomb) < LIMIT
        for path, kind in ((f"{AGL}/spans", ARROW), ("/v1/traces", "application/x-protobuf")):
            headers = {"Content-Encoding": "gzip", "Content-Type": kind}
            assert (await http.post(path, content=bomb, headers=headers)).status_code == 413

    async def test_a_store_out_of_reach_is_503(self, store: LocalStoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(*_: Any, **__: Any) -> Any:
            raise InfrastructureError("the disk is full")

        monkeypatch.setattr(store, "_call", fail)
        transport = httpx.ASGITransport(StoreApi(store, TOKEN))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://s", headers=headers) as http:
            answer = await http.get(f"{AGL}/statistics")
            traces = await http.post("/v1/traces", content=otlp("r", "a"), headers={"Content-Type": PROTOBUF})
        assert (answer.status_code, answer.json()) == (503, {"detail": "the disk is full"})
        assert (traces.status_code, traces.headers["retry-after"]) == (503, answer.headers["retry-after"])

    async def test_a_defect_tells_no_traceback(self, store: LocalStoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(*_: Any, **__: Any) -> Any:
            raise KeyError("secret")

        monkeypatch.setattr(store, "_call", fail)
        transport = httpx.ASGITransport(StoreApi(store, TOKEN), raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://s", headers=headers) as http:
            answer = await http.get(f"{AGL}/statistics")
        assert answer.status_code == 500
        assert "secret" not in answer.text and "Traceback" not in answer.text


class TestAgentLightningsConversation:
    """Requests and answers as 0.3's client has them."""

    async def test_from_the_queue_to_the_end(self, http: httpx.AsyncClient) -> None:
        resources = {"prompt": {"resource_type": "prompt_template", "template": "Hi {x}", "engine": "f-string"}}
        published = await http.post(f"{AGL}/resources", json=resources)
        assert published.status_code == 201
        resources_id = published.json()["resources_id"]
        assert (await http.get(f"{AGL}/resources/latest")).json() == published.json()
        assert (await http.get(f"{AGL}/resources/{resources_id}")).json()["resources"] == resources
        page = (await http.get(f"{AGL}/resources", params={"limit": -1, "offset": 0})).json()
        assert page == {"items": [published.json()], "limit": -1, "offset": 0, "total": 1}

        request = {"input": {"q": 1}, "mode": "train", "resources_id": None, "config": None, "metadata": None}
        queued = await http.post(f"{AGL}/queues/rollouts/enqueue", json={"rollouts": [request]})
        assert queued.status_code == 201
        (rollout,) = queued.json()
        assert (rollout["input"], rollout["status"], rollout["resources_id"]) == ({"q": 1}, "queuing", resources_id)
        assert (await http.post(f"{AGL}/queues/rollouts/enqueue", json={"rollouts": []})).json() == []

        claimed = await http.post(f"{AGL}/queues/rollouts/dequeue", json={"limit": 1, "worker_id": "w-1"})
        assert claimed.status_code == 200
        (claim,) = claimed.json()
        ids = {"rollout_id": rollout["rollout_id"], "attempt_id": claim["attempt"]["attempt_id"]}
        assert (claim["rollout_id"], claim["attempt"]["worker_id"]) == (ids["rollout_id"], "w-1")
        assert (await http.post(f"{AGL}/queues/rollouts/dequeue")).json() == []

        assert (await http.post(f"{AGL}/spans/next", json=ids)).json() == {"sequence_id": 1}
        span = {
            **ids,
            "sequence_id": 1,
            "trace_id": "0" * 31 + "1",
            "span_id": "0" * 15 + "2",
            "parent_id": None,
            "name": "agentlightning.annotation",
            "status": {"status_code": "OK", "description": None},
            "attributes": {"agentlightning.reward.0.value": 0.5},
            "events": [{"name": "e", "attributes": {}, "timestamp": 1.5}],
            "links": [],
            "start_time": 1.0,
            "end_time": 2.0,
            "context": {"trace_id": "0" * 31 + "1", "span_id": "0" * 15 + "2", "is_remote": False, "trace_state": {}},
            "parent": None,
            "resource": {"attributes": {"service.name": "agent"}, "schema_url": ""},
            "kind": "INTERNAL",
        }
        added = await http.post(f"{AGL}/spans", json=span)
        assert (added.status_code, added.json()) == (201, span)
        again = await http.post(f"{AGL}/spans", json=span)
        assert (again.status_code, again.json()) == (201, None)

        search = {
            "rollout_id": ids["rollout_id"],
            "limit": -1,
            "offset": 0,
            "name_contains": "annot",
            "filter_logic": "and",
        }
        found = (await http.post(f"{AGL}/spans/search", json=search)).json()
        assert found == {"items": [span], "limit": -1, "offset": 0, "total": 1}
        assert (await http.get(f"{AGL}/spans", params={"rollout_id": ids["rollout_id"]})).json() == found

        attempts = f"{AGL}/rollouts/{ids['rollout_id']}/attempts"
        running = (await http.get(f"{attempts}/latest")).json()
        assert running["status"] == "running"
        ended = await http.post(f"{attempts}/{ids['attempt_id']}", json={"status": "succeeded"})
        assert (ended.status_code, ended.json()["status"]) == (200, "succeeded")
        assert (await http.get(attempts)).json()["items"] == [ended.json()]
        assert (await http.post(f"{attempts}/search", json={"limit": -1, "offset": 0})).json()["total"] == 1

        one = (await http.get(f"{AGL}/rollouts/{ids['rollout_id']}")).json()
        assert (one["status"], one["attempt"]) == ("succeeded", ended.json())
        params = {"status_in": ["succeeded", "failed"], "sort_by": "start_time", "sort_order": "desc"}
        assert (await http.get(f"{AGL}/rollouts", params=params)).json()["items"] == [one]
        search = {"limit": -1, "offset": 0, "rollout_id_in": [ids["rollout_id"]], "filter_logic": "and"}
        assert (await http.post(f"{AGL}/rollouts/search", json=search)).json()["items"] == [one]
        waited = await http.post(f"{AGL}/waits/rollouts", json={"rollout_ids": [ids["rollout_id"]], "timeout": 0.1})
        assert [rollout["rollout_id"] for rollout in waited.json()] == [ids["rollout_id"]]

        beat = await http.post(f"{AGL}/workers/w-1", json={"heartbeat_stats": {"gpu": 0.5}})
        assert beat.json()["heartbeat_stats"] == {"gpu": 0.5}
        assert (await http.post(f"{AGL}/workers/w-1")).status_code == 200
        assert (await http.get(f"{AGL}/workers/w-1")).json()["worker_id"] == "w-1"
        assert (await http.post(f"{AGL}/workers/search", json={"filter_logic": "and"})).json()["total"] == 1
        statistics = (await http.get(f"{AGL}/statistics")).json()
        assert (statistics["total_rollouts"], statistics["total_spans"]) == (1, 1)

    async def test_starting_past_the_queue(self, http: httpx.AsyncClient) -> None:
        request = {"input": 1, "mode": None, "resources_id": None, "config": None, "metadata": None, "worker_id": None}
        started = await http.post(f"{AGL}/rollouts", json=request)
        assert started.status_code == 201
        rollout_id = started.json()["rollout_id"]
        second = await http.post(f"{AGL}/rollouts/{rollout_id}/attempts")
        assert (second.status_code, second.json()["attempt"]["sequence_id"]) == (201, 2)
        changed = await http.post(f"{AGL}/rollouts/{rollout_id}", json={"mode": "val", "metadata": {"a": 1}})
        assert (changed.json()["mode"], changed.json()["metadata"]) == ("val", {"a": 1})
        cancelled = await http.post(f"{AGL}/rollouts/{rollout_id}", json={"status": "cancelled"})
        assert cancelled.json()["status"] == "cancelled"

    async def test_what_is_not_there_is_null(self, http: httpx.AsyncClient) -> None:
        for path in ("rollouts/ro-0", "workers/w-0", "resources/rs-0", "resources/latest"):
            answer = await http.get(f"{AGL}/{path}")
            assert (answer.status_code, answer.json()) == (200, None)


class TestOursBeside:
    async def test_many_spans_in_one_body(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        spans = [span_of(claim).model_dump(mode="json") for _ in range(3)]
        answer = await http.post(f"{AGL}/spans", json=[*spans, spans[0]])
        assert (answer.status_code, answer.json()) == (201, {"stored": 3, "left_out": [3]})

    async def test_spans_as_arrow(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        row = {
            **span_of(claim).model_dump(),
            "prompt_ids": np.arange(5, dtype=np.int32),
            "sampled_ids": [6, 7],
            "logprobs": [-0.5, -1.5],
        }
        table = pa.Table.from_batches([spans_to_batch([row])])
        headers = {"Content-Type": ARROW}
        answer = await http.post(f"{AGL}/spans", content=encode_table(table).to_pybytes(), headers=headers)
        assert (answer.status_code, answer.json()) == (201, {"stored": 1, "left_out": []})
        body = {"rollout_ids": [claim.rollout_id], "columns": ["span_id", "prompt_ids"]}
        stored = await http.post(f"{AGL}/spans/scan", json=body, headers={"Accept": ARROW})
        assert stored.headers["content-type"] == ARROW
        found = pa.ipc.open_stream(stored.content).read_all()
        assert found.to_pylist() == [{"span_id": row["span_id"], "prompt_ids": [0, 1, 2, 3, 4]}]
        as_json = (await http.post(f"{AGL}/spans/scan", json=body)).json()
        assert as_json == {"columns": ["span_id", "prompt_ids"], "rows": [[row["span_id"], [0, 1, 2, 3, 4]]]}

    async def test_arrow_that_is_damaged_or_foreign(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        table = pa.Table.from_batches([spans_to_batch([span_of(claim)])])
        good = encode_table(table).to_pybytes()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SPAN_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        foreign = encode_table(pa.table({"colour": ["red"]})).to_pybytes()
        runs = table.set_column(0, "rollout_id", pa.array([claim.rollout_id]).dictionary_encode())
        bodies = [b"", b"x" * 100, good[: len(good) // 2], sink.getvalue().to_pybytes(), foreign, encode_table(runs)]
        for body, status in zip(bodies, (400, 400, 400, 415, 422, 422), strict=True):
            answer = await http.post(f"{AGL}/spans", content=bytes(body), headers={"Content-Type": ARROW})
            assert (answer.status_code, list(answer.json())) == (status, ["detail"]), body

    async def test_flipped_bytes_of_arrow_are_refused_or_stored(
        self, http: httpx.AsyncClient, claim: AttemptedRollout
    ) -> None:
        row = {**span_of(claim).model_dump(), "prompt_ids": [1, 2, 3], "logprobs": [0.5]}
        good = encode_table(pa.Table.from_batches([spans_to_batch([row] * 3)])).to_pybytes()
        rng = np.random.default_rng(0)
        for _ in range(150):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            answer = await http.post(f"{AGL}/spans", content=bytes(bad), headers={"Content-Type": ARROW})
            assert answer.status_code in (201, 400, 404, 413, 415, 422), answer.text
        search = await http.post(f"{AGL}/spans/search", json={"rollout_id": claim.rollout_id})
        assert search.status_code == 200

    async def test_workers_and_ends(self, client: HttpStoreClient, claim: AttemptedRollout) -> None:
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        assert await client.heartbeat("w", [ids, ("ro-0", "at-0")]) == [("ro-0", "at-0")]
        assert await client.get_many_span_sequence_ids([ids, ids]) == [1, 2]
        (rollout,) = await client.finish_many_attempts(
            [Finish(*ids, "succeeded", {"note": b"\xff"})], spans_to_batch([span_of(claim)])
        )
        assert rollout.status == "succeeded"
        assert (await client.get_latest_attempt(ids[0])).metadata == {"note": b"\xff"}
        assert len(await client.query_spans(ids[0])) == 1
        assert await client.release_worker("w", "gone") == []
        await client.compact()
        assert await client.delete_rollouts([ids[0], "ro-0"]) == [ids[0]]
        assert await client.get_rollout_by_id(ids[0]) is None

    async def test_delete_by_method(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        answer = await http.delete(f"{AGL}/rollouts/{claim.rollout_id}")
        assert answer.json() == {"rollout_ids": [claim.rollout_id]}

    async def test_ids_with_slashes(self, client: HttpStoreClient) -> None:
        await client.enqueue_rollout(1, rollout_id="group/1 ü%2F")
        claim = await client.dequeue_rollout("node/pid")
        assert claim is not None and claim.rollout_id == "group/1 ü%2F"
        assert (await client.get_worker_by_id("node/pid")).worker_id == "node/pid"
        assert (await client.update_rollout(claim.rollout_id, status="cancelled")).status == "cancelled"

    async def test_what_json_cannot_hold(self, client: HttpStoreClient, http: httpx.AsyncClient) -> None:
        task = {"raw": b"\x00\xff", "most": float("inf"), "deep": [{"a": None}]}
        rollout = await client.enqueue_rollout(task)
        assert rollout.input == task
        shown = (await http.get(f"{AGL}/rollouts/{rollout.rollout_id}")).json()["input"]
        assert shown == {"raw": "AP8=", "most": None, "deep": [{"a": None}]}
        with pytest.raises(StoreError, match="object"):
            await client.enqueue_rollout(object())

    async def test_sql(self, http: httpx.AsyncClient, client: HttpStoreClient, claim: AttemptedRollout) -> None:
        await client.add_span(span_of(claim))
        query = "SELECT rollout_id, count(*) AS n FROM spans GROUP BY rollout_id"
        assert (await client.sql(query)).to_pylist() == [{"rollout_id": claim.rollout_id, "n": 1}]
        answer = (await http.post(f"{AGL}/sql", json={"query": query})).json()
        assert answer == {"columns": ["rollout_id", "n"], "rows": [[claim.rollout_id, 1]]}
        with pytest.raises(StoreError, match="colour"):
            await client.sql("SELECT colour FROM spans")

    async def test_msgpack_of_others(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        headers = {"Content-Type": "application/msgpack"}
        for task, status in (({"a": b"\xff", 1: 2}, 201), (msgpack.ExtType(65, b"x"), 400), ({(1, 2): 3}, 400)):
            content = msgpack.packb({"input": task})
            assert (await http.post(f"{AGL}/rollouts", content=content, headers=headers)).status_code == status
        time = {**span_of(claim).model_dump(), "attributes": {"at": msgpack.Timestamp(1)}}
        assert (await http.post(f"{AGL}/spans", content=msgpack.packb(time), headers=headers)).status_code == 201
        assert (await http.get(f"{AGL}/spans", params={"rollout_id": claim.rollout_id})).status_code == 200


class TestTheClient:
    async def test_waits_as_long_as_it_takes(self, client: HttpStoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_ray.store.http.client._ASKED_WAIT_SECONDS", 0.2)
        rollout = await client.enqueue_rollout(1)
        claim = await client.dequeue_rollout("w")
        assert claim is not None
        wait = asyncio.create_task(client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60))
        next_claim = asyncio.create_task(client.dequeue_rollout("w", timeout=60))
        await asyncio.sleep(0.7)
        assert not wait.done() and not next_claim.done()
        await client.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, "succeeded")
        await client.enqueue_rollout(2)
        assert [one.rollout_id for one in await wait] == [rollout.rollout_id]
        assert (await next_claim).input == 2
        assert await client.dequeue_rollout("w", timeout=0.3) is None

    async def test_a_released_worker_stops_waiting(self, client: HttpStoreClient) -> None:
        waiting = asyncio.create_task(client.dequeue_rollout("w", timeout=60))
        await asyncio.sleep(0.3)
        await client.release_worker("w", "dead")
        assert await asyncio.wait_for(waiting, 20) is None

    async def test_a_caller_that_hangs_up_claims_nothing(self, client: HttpStoreClient, address: str) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=address, headers=headers, timeout=0.3) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(f"{AGL}/queues/rollouts/dequeue", json={"timeout": 30, "worker_id": "gone"})
        await asyncio.sleep(0.3)
        await client.enqueue_rollout(1)
        claim = await client.dequeue_rollout("w")
        assert claim is not None and claim.attempt.worker_id == "w"

    async def test_a_wrong_token_is_a_refusal(self, address: str) -> None:
        with pytest.raises(StoreError, match="token is wrong"):
            await HttpStoreClient(address, "other").statistics()

    @pytest.mark.parametrize("address", ["nonsense", "ftp://host", "http://"])
    def test_an_address_that_is_none(self, address: str) -> None:
        with pytest.raises(ConfigError, match=address):
            HttpStoreClient(address, TOKEN)

    async def test_a_silent_server_ends_at_the_deadline(self) -> None:
        with pytest.raises(InfrastructureError, match="statistics"):
            await HttpStoreClient("http://127.0.0.1:9", TOKEN, deadline=0.5).statistics()

    async def test_can_be_pickled(self, client: HttpStoreClient, address: str) -> None:
        copy: HttpStoreClient = pickle.loads(pickle.dumps(client))
        assert copy.otlp_traces_endpoint() == f"{address}/v1/traces"
        assert copy.capabilities["otlp_traces"]
        assert await copy.query_rollouts() == []
        await copy.close()

    async def test_works_in_several_event_loops(self, client: HttpStoreClient) -> None:
        async def count() -> int:
            found = (await client.statistics())["total_rollouts"]
            await client.close()
            return found

        assert await count() == 0
        assert await asyncio.to_thread(asyncio.run, count()) == 0

    async def test_large_batches_travel_in_parts(
        self, client: HttpStoreClient, claim: AttemptedRollout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_ray.store.http.client._APPEND_BYTES", 5000)
        spans = [span_of(claim) for _ in range(40)]
        await client.add_span(spans[17])
        assert await client.append_spans(spans_to_batch(spans)) == [17]
        assert len(await client.query_spans(claim.rollout_id)) == 40
        stray = span_of(claim).model_copy(update={"attempt_id": "at-0"})
        more = [span_of(claim) for _ in range(40)]
        with pytest.raises(StoreError, match="at-0"):
            await client.append_spans(spans_to_batch([*more[:20], stray, *more[20:]]))
        assert len(await client.query_spans(claim.rollout_id)) == 80

    async def test_resends_after_a_dropped_connection_count_once(self, store: LocalStoreClient, address: str) -> None:
        async with Dropper(address) as dropper:
            client = HttpStoreClient(dropper.address, TOKEN, deadline=30)
            dropper.drop = 1
            rollout = await client.enqueue_rollout({"q": 1})
            dropper.drop = 1
            claim = await client.dequeue_rollout("w")
            assert claim is not None and claim.rollout_id == rollout.rollout_id
            dropper.drop = 2
            await client.append_spans(spans_to_batch([span_of(claim), span_of(claim)]))
            dropper.drop = 1
            started = await client.start_rollout({"q": 2})
            dropper.drop = 1
            second = await client.start_attempt(started.rollout_id)
            dropper.drop = 1
            await client.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, "succeeded")
            assert dropper.dropped == 7
            await client.close()
        statistics = await store.statistics()
        assert (statistics["total_rollouts"], statistics["total_spans"], statistics["total_attempts"]) == (2, 2, 3)
        assert second.attempt.sequence_id == 2


class Dropper:
    """A proxy that passes requests on, and hangs up in place of the answer ``drop`` times."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.removeprefix("http://").partition(":")
        self._port = int(port)
        self.drop = self.dropped = 0

    async def __aenter__(self) -> Dropper:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        forward = asyncio.create_task(self._pass(reader, up_writer))
        while answer := await up_reader.read(65536):
            if self.drop:
                self.drop -= 1
                self.dropped += 1
                break
            writer.write(answer)
            await writer.drain()
        forward.cancel()
        writer.close()
        up_writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)


PROTOBUF = "application/x-protobuf"


def otlp(rollout_id: str | None, attempt_id: str | None, of_span: Mapping[str, str] | None = None) -> bytes:
    """An export of one span, its attempt named by the resource, and by the span itself."""
    export = ExportTraceServiceRequest()
    group = export.resource_spans.add()
    for key, value in (("rollout_id", rollout_id), ("attempt_id", attempt_id)):
        if value is not None:
            group.resource.attributes.add(key=f"agentlightning.{key}").value.string_value = value
    one = group.scope_spans.add().spans.add(name="work", trace_id=b"t" * 16, span_id=b"s" * 8)
    for key, value in (of_span or {}).items():
        one.attributes.add(key=f"agentlightning.{key}").value.string_value = value
    return export.SerializeToString()


async def post_traces(http: httpx.AsyncClient, body: bytes, **headers: str) -> ExportTraceServiceResponse:
    given = {"Content-Type": PROTOBUF, **{name.replace("_", "-"): value for name, value in headers.items()}}
    answer = await http.post("/v1/traces", content=body, headers=given)
    assert (answer.status_code, answer.headers["content-type"]) == (200, PROTOBUF), answer.text
    return ExportTraceServiceResponse.FromString(answer.content)


class TestOtlp:
    @pytest.mark.parametrize("compression", list(Compression))
    async def test_a_real_exporter(
        self, address: str, store: LocalStoreClient, claim: AttemptedRollout, compression: Compression
    ) -> None:
        exporter = OTLPSpanExporter(
            f"{address}/v1/traces",
            headers={
                "Authorization": f"Bearer {TOKEN}",
                "x-lightning-rollout-id": claim.rollout_id,
                "x-lightning-attempt-id": claim.attempt.attempt_id,
            },
            compression=compression,
        )
        resource = Resource({"service.name": "agent"}, "https://schema")

        def work() -> tuple[Any, Any]:
            provider = TracerProvider(resource=resource)
            provider.add_span_processor(SimpleSpanProcessor(exporter))
            tracer = provider.get_tracer("library", "1.2")
            with tracer.start_as_current_span("parent") as parent:
                linked = Link(parent.get_span_context(), {"why": "test"})
                with tracer.start_as_current_span("child", links=[linked], attributes={"n": 1, "list": [1.5]}) as child:
                    child.add_event("happened", {"ok": True})
                    child.set_status(Status(StatusCode.ERROR, "no"))
            provider.shutdown()
            return parent, child

        parent, child = await asyncio.to_thread(work)
        stored = {span.name: span for span in await store.query_spans(claim.rollout_id)}
        assert sorted(span.sequence_id for span in stored.values()) == [1, 2]
        for source in (parent, child):
            number = stored[source.name].sequence_id
            expected = Span.from_opentelemetry(source, claim.rollout_id, claim.attempt.attempt_id, number)
            # The protocol sends the id of the parent, not its context.
            assert stored[source.name] == expected.model_copy(update={"parent": None})

    async def test_the_span_says_better_than_the_resource_than_the_header(
        self, http: httpx.AsyncClient, store: LocalStoreClient
    ) -> None:
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=index) for index in range(3)])
        first, second, third = [
            {"rollout_id": one.rollout_id, "attempt_id": one.attempt.attempt_id}
            for one in await store.dequeue_many_rollouts(limit=3)
        ]
        headers = {"x-lightning-rollout-id": third["rollout_id"], "x-lightning-attempt-id": third["attempt_id"]}
        await post_traces(http, otlp(None, None), **headers)
        await post_traces(http, otlp(**second), **headers)
        await post_traces(http, otlp(**second, of_span={**first, "span_sequence_id": "7"}), **headers)
        counts = [len(await store.query_spans(one["rollout_id"])) for one in (first, second, third)]
        assert counts == [1, 1, 1]
        (numbered,) = await store.query_spans(first["rollout_id"])
        assert numbered.sequence_id == 7

    async def test_what_cannot_be_placed_is_counted_and_explained(
        self, http: httpx.AsyncClient, store: LocalStoreClient, claim: AttemptedRollout
    ) -> None:
        export = ExportTraceServiceRequest()
        for ids in ((None, None), (claim.rollout_id, None), ("ro-0", "at-0"), (claim.rollout_id, "at-0")):
            export.MergeFromString(otlp(*ids))
        export.MergeFromString(otlp(claim.rollout_id, claim.attempt.attempt_id))
        partial = (await post_traces(http, export.SerializeToString())).partial_success
        assert partial.rejected_spans == 4
        for named in ("agentlightning.rollout_id", "x-lightning-rollout-id", "ro-0", "at-0"):
            assert named in partial.error_message
        assert len(await store.query_spans(claim.rollout_id)) == 1

    async def test_a_full_success_says_nothing(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        body = otlp(claim.rollout_id, claim.attempt.attempt_id)
        for _ in range(2):
            assert not (await post_traces(http, body)).HasField("partial_success")
        assert not (await post_traces(http, b"")).HasField("partial_success")

    async def test_json(self, http: httpx.AsyncClient, store: LocalStoreClient, claim: AttemptedRollout) -> None:
        ids = {"rollout_id": claim.rollout_id, "attempt_id": claim.attempt.attempt_id}
        attributes = [{"key": f"agentlightning.{key}", "value": {"stringValue": value}} for key, value in ids.items()]
        span = {"name": "js", "traceId": "5b8e" * 8, "spanId": "eee1" * 4, "kind": 3, "startTimeUnixNano": str(10**18)}
        body = {
            "resourceSpans": [{"resource": {"attributes": attributes}, "scopeSpans": [{"spans": [span], "new": 1}]}]
        }
        answer = await http.post("/v1/traces", json=body)
        assert (answer.status_code, answer.json()) == (200, {})
        (stored,) = await store.query_spans(claim.rollout_id)
        assert (stored.trace_id, stored.span_id, stored.kind) == ("5b8e" * 8, "eee1" * 4, "CLIENT")
        assert stored.start_time == 1e9

    @pytest.mark.parametrize(
        ("body", "kind", "status"),
        [
            (b"\xff\xff", PROTOBUF, 400),
            (b"{", "application/json", 400),
            (b"[]", "application/json", 400),
            (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "xyz"}]}]}]}', "application/json", 400),
            (b"", "text/plain", 415),
        ],
    )
    async def test_bodies_that_are_none(self, http: httpx.AsyncClient, body: bytes, kind: str, status: int) -> None:
        answer = await http.post("/v1/traces", content=body, headers={"Content-Type": kind})
        assert answer.status_code == status
        if kind == PROTOBUF:
            assert "no OTLP export" in RpcStatus.FromString(answer.content).message
        else:
            assert answer.json()["message"]

    async def test_flipped_bytes_are_refused_or_stored(self, http: httpx.AsyncClient, claim: AttemptedRollout) -> None:
        good = otlp(claim.rollout_id, claim.attempt.attempt_id, {"span_sequence_id": "3"})
        rng = np.random.default_rng(0)
        for _ in range(150):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            answer = await http.post("/v1/traces", content=bytes(bad), headers={"Content-Type": PROTOBUF})
            assert answer.status_code in (200, 400), answer.content
        assert (await http.get(f"{AGL}/spans", params={"rollout_id": claim.rollout_id})).status_code == 200

    async def test_other_signals_are_not_served(self, http: httpx.AsyncClient) -> None:
        for signal in ("metrics", "logs"):
            assert (await http.post(f"/v1/{signal}")).status_code == 501


async def test_prompt_templates_keep_their_type(client: HttpStoreClient) -> None:
    template = PromptTemplate(template="Hi {x}")
    published = await client.add_resources({"p": template})
    assert (await client.get_latest_resources()) == published
    assert published.resources["p"] == template
    assert [one.resources_id for one in await client.query_resources(resources_id_contains="rs")] == [
        published.resources_id
    ]
