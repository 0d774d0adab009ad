"""kill -9 of a run's parts, one after the other, and of its driver: it goes on, and nothing is lost or counted twice.

The chaos benchmark with fewer kills, on a simulated cluster: real Ray, Serve, HAProxy, vLLM and trainer ranks. What
becomes of replicas and trainer ranks is also tested in ``test_replicas``, ``test_swap_faults`` and ``test_async``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import Chaos
from benchmarks.chaos_train import make_model

pytestmark = pytest.mark.e2e
KILLS = ("runner", "store", "proxy_manager")


async def test_a_run_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    make_model("words", tmp_path / "model")
    figures = await Chaos(tmp_path, "words", lambda what: None).run(1, KILLS, alone=False)
    assert {name: figures[f"kills.{name}"] for name in (*KILLS, "driver")} == dict.fromkeys((*KILLS, "driver"), 1)
    assert figures["lost_rollouts"] == figures["duplicate_rollouts"] == figures["steps_missing"] == 0
    assert figures["acknowledged_spans"] > 100 and figures["lost_acknowledged_spans"] == 0
    assert figures["swaps"] > 0 and figures["unproved_swaps"] == figures["unproved_tokens_trained"] == 0
    assert figures["stale_tokens_beyond_bound"] == 0
    assert figures["left_behind"] == []
    assert figures["hangs"] == 0
