"""In bfloat16 logprobs of engine and trainer differ by more than an update moves them: a swap is proved by bits too.

Real Ray, Serve, vLLM and a trainer rank, with the settings' own tolerance; by the object store also to an engine in a
process of its own, as on GPUs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.errors import SwapError
from lightning_ray.run.run import Run
from lightning_ray.trajectories.account import batch_of, settle
from tests.e2e.started import started
from tests.e2e.tiny import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
TASKS = [{"question": f"w{i} w{i + 1}", "length": 8} for i in range(4)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[("object", "own"), ("gloo", "replica")])
async def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    transfer, process = request.param
    engine = EngineSettings(
        dtype="bfloat16", transfer=transfer, process=process, max_model_len=128, kv_cache_memory_mb=16
    )
    settings = GRPO(model=make_tiny_model, ranks=1, learning_rate=1e-5, warmup_steps=0, engine=engine)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=32)
    async with started(tmp_path_factory.mktemp("runs") / "coarse", settings, TASKS, runners) as run:
        yield run


async def update(run: Run) -> dict[str, Any]:
    episodes, groups = await run.play_groups(TASKS, 4, sampled=True)
    return await run.update(batch_of(settle(episodes, groups).trained, groups))


async def test_a_swap_is_proved_by_its_bits_too(run: Run) -> None:
    swapper = run.policy.swapper
    assert swapper.last is not None and 1e-4 < swapper.last.max_logprob_diff < 0.5, "not coarser than float32"
    figures = await update(run)
    assert 1e-4 < figures["max_logprob_diff"] < 0.5
    await run.publish(1)
    assert not swapper.last.mended and swapper.last.compared, "no weights were compared"
    [member] = await run.cluster.replicas("describe")
    assert member["version"] == 1 and member["proved"]


async def test_an_engine_that_kept_its_weights_is_refused_though_its_logprobs_would_pass(run: Run) -> None:
    await update(run)
    swapper: Any = run.policy.swapper
    version, held = run.state.version, await run.cluster.replicas("probes")
    send = swapper.transfer.send

    async def send_to_nobody(*given: Any) -> Any:
        """Everything but the loading."""
        [replica] = await run.cluster.replicas("describe")
        trainers = run.cluster.trainers
        exports = await trainers.call("export", 0, 1, 0, timeout=60)
        canaries = [[1, 2, 3, 4, 5, 6]]
        rows = (await trainers.call("logprobs", canaries, timeout=60))[0]
        expected = [[float(x) for x in row] for row in rows]
        shown = await run.cluster.replicas("prove", version, canaries, expected, 0.5, exports[0]["bits"])
        assert shown[0]["replica_id"] == replica["replica_id"] and shown[0]["max_logprob_diff"] < 0.5
        return shown

    async def no_restart(replica_ids: Any) -> None:
        pass

    restart, swapper._restart, swapper.transfer.send = swapper._restart, no_restart, send_to_nobody
    try:
        with pytest.raises(SwapError, match=r"differ from the trainer's: .*model\.embed_tokens\.weight \(1\)"):
            await run.publish(version)
    finally:
        swapper._restart, swapper.transfer.send = restart, send
    assert held == await run.cluster.replicas("probes")
    await run.publish(version + 1)
    assert swapper.last.version == version + 1 and all(proof.holds for proof in swapper.last.proofs)
