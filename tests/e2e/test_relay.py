"""A judge behind the relay: beside the policy in a run, and served by itself over a store.

Real Ray, Serve, HAProxy, vLLM and a trainer rank; the judge's endpoint is a real HTTP server of this process.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.capture.audience import relayed
from lightning_ray.capture.keys import Claims, issue_key, operator_key
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.net import free_port
from lightning_ray.own_ray import OwnRay
from lightning_ray.progress import Reporter
from lightning_ray.relay.settings import Upstream
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from lightning_ray.types import NamedResources, ProxyLLM, Rollout
from tests.e2e.tiny import make_tiny_model
from tests.relay_parts import COST, PRICES, ask
from tests.relay_upstream import KEY, WORDS, FakeUpstream, listening

pytestmark = pytest.mark.e2e
TASKS = [{"question": "w1 w2"}, {"question": "w3"}]
CALL = "openai.chat.completion"


class Judged(lr.LitAgent[dict[str, Any]]):
    """Answers with the policy and has the judge look at it; tells what it could see of the judge's key."""

    async def rollout_async(self, task: dict[str, Any], resources: NamedResources, rollout: Rollout) -> float:
        said = ""
        for name in ("main_llm", "judge"):
            llm: Any = resources[name]
            base = llm.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id)  # type: ignore[attr-defined]
            client = AsyncOpenAI(base_url=base, api_key=llm.api_key)
            message: Any = {"role": "user", "content": said or task["question"]}
            stream = await client.chat.completions.create(
                model=llm.model, messages=[message], max_tokens=4, stream=True
            )
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        lr.emit_annotation({"seen": float(KEY in repr((dict(os.environ), resources)))})
        lr.emit_annotation({"first": float(next(iter(resources)) == "main_llm")})
        return float(said.startswith("".join(WORDS)))


@pytest.fixture
async def fake() -> AsyncIterator[FakeUpstream]:
    upstream = FakeUpstream()
    async with listening(upstream.app()) as address:
        upstream.address = f"{address}/v1"
        yield upstream


async def test_a_run_with_a_judge(fake: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = Upstream(base_url=fake.address, api_key_env="JUDGE_KEY", model="big-model", **PRICES)  # type: ignore[arg-type]
    folder = RunFolder(tmp_path / "judged")
    folder.create(resume=False)
    settings = GRPO(model=make_tiny_model, ranks=1, engine=EngineSettings(max_model_len=128, kv_cache_memory_mb=16))
    cluster = Cluster(relays={"judge": judge})
    run = Run(folder, Reporter(Console(quiet=True)), cluster, Judged(), {"train": TASKS}, RunnerSettings(), False)
    try:
        await run.start(settings)
        assert os.environ["JUDGE_KEY"] == KEY
        episodes, _ = await run.play_groups(TASKS, 2, sampled=True)
        resources = await run.store.get_resources_by_id("sampled")
        spans = await run.store.scan_spans([episode.rollout_id for episode in episodes])
        endpoint = resources.resources["judge"].endpoint  # type: ignore[union-attr]
        async with httpx.AsyncClient(timeout=20) as http:
            status = await http.get(
                f"{endpoint.removesuffix('/v1')}/status",
                headers={"x-api-key": operator_key(cluster.secret, 60)},
            )
    finally:
        await run.close()
    for episode in episodes:
        assert (episode.rollout.status, episode.reward, episode.calls) == ("succeeded", 1.0, 1)
        assert len(episode.trajectories) == 1, "the judge's words are not trained on"
        assert episode.annotations["seen"] == [0.0] and episode.annotations["first"] == [1.0]
    kept = spans.to_pylist()
    # The agent's own client is traced too; what the relay saw names its upstream.
    relayed = [span for span in kept if span["name"] == CALL and b"upstream" in span["more"]]
    assert len(relayed) == 4 and all(span["prompt_ids"] is None and span["status"] == "OK" for span in relayed)
    assert KEY.encode() not in b"".join(span["more"] for span in kept)
    assert KEY not in f"{resources}" and resources is not None
    assert status.json()["calls"] == 4 and status.json()["money"] == pytest.approx(4 * COST)


@pytest.fixture
def small_ray() -> Iterator[None]:
    from ray import serve

    own = OwnRay.start(lambda _: {}, {"num_cpus": 4})
    yield
    serve.shutdown()
    own.end()


async def test_served_by_itself(
    small_ray: None, fake: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from actors import span_store
    from deployments.relay import SECRET_VARIABLE, RelaySettings, app
    from lightning_ray.store.client import StoreClient

    secret = "a secret of sufficient length"
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    store = StoreClient(span_store.start(tmp_path / "store", "judged-store"))
    file = tmp_path / "upstreams.toml"
    prices = "price_input_per_million = 2.0\nprice_output_per_million = 10.0\nmax_spend = 0.0005"
    file.write_text(f'[judge]\nbase_url = "{fake.address}"\napi_key_env = "JUDGE_KEY"\n{prices}\n')
    port = free_port("127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    application = app(RelaySettings(name="judged-store", upstreams=file))
    await asyncio.to_thread(serve.run, application, name="relay", route_prefix="/")

    rollout = await store.start_rollout({"question": 1})
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    endpoint = ProxyLLM(endpoint=f"http://127.0.0.1:{port}/to/judge/v1", model="m").get_base_url(*ids)
    claims = Claims(*ids, time.time() + 60, {}, relayed("judge"))
    client = AsyncOpenAI(base_url=endpoint, api_key=issue_key(secret.encode(), claims))
    fake.pace = 1.0
    before_the_last = []
    stream = await client.chat.completions.create(**ask(), stream=True)
    async for _ in stream:
        before_the_last.append(len(fake.sent))
    assert before_the_last[0] < 3 and before_the_last[1] < 4, "as they came"
    assert (await store.query_spans(rollout.rollout_id))[0].status.status_code == "OK"

    fake.pace = 0.5
    stream = await client.chat.completions.create(**ask(), stream=True)
    async for _ in stream:
        break
    await stream.close()
    for _ in range(100):
        if fake.cancelled:
            break
        await asyncio.sleep(0.05)
    assert fake.cancelled == 1
    fake.pace = 0.0

    await asyncio.to_thread(serve.delete, "relay")
    await asyncio.to_thread(serve.run, application, name="relay", route_prefix="/")
    operator = {"authorization": f"Bearer {operator_key(secret.encode(), 60)}"}
    async with httpx.AsyncClient(timeout=20) as http:
        status = (await http.get(f"http://127.0.0.1:{port}/status", headers=operator)).json()
    assert status["judge"]["calls"] == 2 and status["judge"]["money"] == pytest.approx(COST), "known after a restart"
    await client.chat.completions.create(**ask())
    with pytest.raises(Exception, match="may cost"):
        await client.chat.completions.create(**ask())
