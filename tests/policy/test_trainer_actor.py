"""The policy trainer as Ray actors: two ranks do what one updater does, and failures are named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

pytest.importorskip("ray")
pytest.importorskip("verl")

from actors.policy_trainer import PolicyTrainerGroup
from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.own_ray import OwnRay
from lightning_ray.policy.settings import UpdateSettings
from tests.policy.oracle import PlainTrainer


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    own = OwnRay.start(lambda _: {}, {"num_cpus": 8})
    yield
    own.end()


async def test_two_ranks_update_save_resume_and_die_with_a_name(
    cluster: None, folder: Path, table: pa.Table, tmp_path: Path
) -> None:
    settings = UpdateSettings(model_path=str(folder), warmup_steps=0, minibatch_rollouts=1000)
    group = await PolicyTrainerGroup.start(settings, ranks=2, timeout=180)
    assert await group.call("ready", timeout=30) == [True, True]

    result = await group.update(table)
    plain = PlainTrainer(folder, settings)
    expected = plain.update(table)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    probe = [table["token_ids"][0].as_py()]
    moved = (await group.logprobs(probe))[0]

    await group.save(str(tmp_path / "saved"))
    second = await group.update(table)
    await group.load(str(tmp_path / "saved"))
    assert ((await group.logprobs(probe))[0] == moved).all()
    assert await group.update(table) == second

    with pytest.raises(ValueError, match="no rows"):
        await group.update(table.slice(0, 0))
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        await group.load(str(folder))
    with pytest.raises(InfrastructureError, match=r"rank \[0, 1\] did not answer 'update' within 0.001 s"):
        await group.update(table, timeout=0.001)

    os.kill((await group.call("pid", timeout=30))[1], signal.SIGKILL)
    told = r"trainer rank 1 died during 'update' \(process \d+, node .*\): .*SIGKILL"
    with pytest.raises(InfrastructureError, match=told):
        await group.update(table, timeout=60)
    group.stop()


async def test_a_wrong_path_is_told_at_once(cluster: None) -> None:
    settings = UpdateSettings(model_path="/no/such/model")
    with pytest.raises(ConfigError, match="model_path='/no/such/model' is not a folder"):
        await PolicyTrainerGroup.start(settings, ranks=2, timeout=120)


async def test_ranks_that_find_no_place_are_named(cluster: None, folder: Path) -> None:
    settings = UpdateSettings(model_path=str(folder), device="cuda")
    told = r"no place .* after 3 s .*: 1 of 1 for trainer\n[\s\S]*no node for trainer has GPU 1"
    with pytest.raises(InfrastructureError, match=told):
        await PolicyTrainerGroup.start(settings, ranks=1, timeout=3)
