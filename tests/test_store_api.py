"""The store's HTTP API on Ray Serve: a real exporter writes, and the actor has it."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray import serve

from actors import span_store
from deployments.store_api import StoreApiSettings, app, find_token
from lightning_ray.errors import ConfigError
from lightning_ray.net import free_port
from lightning_ray.own_ray import OwnRay
from lightning_ray.store import StoreClient
from lightning_ray.store.http.client import TOKEN_VARIABLE, HttpStoreClient


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def small_ray() -> Iterator[None]:
    own = OwnRay.start(lambda _: {}, {"num_cpus": 4})
    yield
    serve.shutdown()
    own.end()


def test_the_token_of_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "given")
    assert find_token(str(tmp_path / "token")) == "given"
    assert not (tmp_path / "token").exists()


def test_a_token_file_is_made_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "token"
    token = find_token(str(path))
    assert len(token) >= 32
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (token, 0o600)
    printed = capsys.readouterr().out
    assert str(path) in printed and token not in printed
    assert find_token(str(path)) == token


@pytest.mark.parametrize("file", [None, "empty", "no/folder"])
def test_without_a_token_nothing_is_served(file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, " ")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="token"):
        find_token(None if file is None else str(tmp_path / file))


async def test_an_exporter_writes_through_serve(
    small_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with pytest.raises(ConfigError, match="'runs-store'"):
        app(StoreApiSettings(name="runs-store"))
    store = StoreClient(span_store.start(tmp_path / "store", "runs-store"))
    port = free_port("127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = StoreApiSettings(name="runs-store", replicas=2, max_body_bytes=100_000)
    await asyncio.to_thread(serve.run, app(settings), name="store", route_prefix="/store")

    address = f"http://127.0.0.1:{port}/store"
    client = HttpStoreClient(address, "secret", deadline=60)
    await client.enqueue_rollout({"question": 1}, rollout_id="a/b")
    claim = await client.dequeue_rollout("w", timeout=10)
    assert claim is not None and claim.rollout_id == "a/b"

    async with httpx.AsyncClient(timeout=30) as http:
        assert (await http.get(f"{address}/v1/agl/health")).json() == {"status": "ok"}
        assert (await http.get(f"{address}/v1/agl/statistics")).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        large = await http.post(f"{address}/v1/agl/rollouts", content=b"x" * 200_000, headers=headers)
        assert large.status_code == 413

    exporter = OTLPSpanExporter(
        client.otlp_traces_endpoint(),
        headers={
            "Authorization": "Bearer secret",
            "x-lightning-rollout-id": claim.rollout_id,
            "x-lightning-attempt-id": claim.attempt.attempt_id,
        },
        compression=Compression.Gzip,
    )

    def work() -> None:
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        for index in range(5):
            with provider.get_tracer("library").start_as_current_span(f"step-{index}"):
                pass
        provider.shutdown()

    await asyncio.to_thread(work)
    spans = await store.query_spans(claim.rollout_id)
    assert [(span.name, span.sequence_id) for span in spans] == [(f"step-{i}", i + 1) for i in range(5)]
    waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=[claim.rollout_id], timeout=30))
    await store.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, "succeeded")
    assert [rollout.status for rollout in await waiting] == ["succeeded"]
    await client.close()
