"""Whether a run is gone is told by its store: not by a store that restarts, but by one whose driver was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning_ray.store import StoreClient

pytest_plugins = "tests.store_stores"
DRIVER = """
import sys, time, ray
from actors.span_store import start
ray.init(sys.argv[1], namespace="lifetime", log_to_driver=False)
actor = start(sys.argv[2], "run/store")
print(ray.get(actor.process_id.remote()), flush=True)
time.sleep(120)
"""


async def test_a_run_is_gone_when_its_driver_was_killed_and_not_while_its_store_restarts(
    cluster: Any, tmp_path: Path
) -> None:
    from deployments.lifetime import are_gone

    address = cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:  # noqa: ASYNC220
        try:
            assert driver.stdout is not None
            process = int(driver.stdout.readline())
            store = StoreClient(cluster.get_actor("run/store", namespace="lifetime"))
            assert not await are_gone(store.actors)
            os.kill(process, signal.SIGKILL)
            assert not await are_gone(store.actors)
            assert (await store.statistics())["rollouts"] == 0
        finally:
            driver.kill()
    deadline = time.monotonic() + 60
    while not await are_gone(store.actors):
        assert time.monotonic() < deadline
