"""How much of the hardware reaches the learning?

    python -m benchmarks.training            (about 9 minutes on 2 cores)
    python -m benchmarks.training --quick    (about 3.5 minutes)

``update_tokens_per_cpu_s_ratio`` is the update's tokens per CPU second over those of a bare PyTorch loop with the same
loss (``training_update``); ``multi_turn_tokens_ratio`` the tokens of an 8-turn agent's rows in trajectory mode over
those in transition mode (``batches``); the others are of two whole runs, without and with overlap of playing and
training (``training_async``). The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from benchmarks import batches, training_async, training_update
from benchmarks.report import show
from benchmarks.store import Goal, circumstances

GOALS = (
    Goal("update_tokens_per_cpu_s_ratio", 0.85, least=True),
    Goal("update_tokens_per_cpu_s_ratio_8m", 0.85, least=True),
    Goal("multi_turn_tokens_ratio", 0.30),
    Goal("max_logprob_diff", 1e-4),
    Goal("async_speedup", 1.6, least=True),
    Goal("unproved_tokens_trained", 0),
    Goal("stale_tokens_beyond_bound", 0),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer windows")
    quick = arguments.parse_args().quick
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.redirect_stdout(sys.stderr):
        figures: dict[str, Any] = training_update.measure(windows=6 if quick else 15)
        figures["multi_turn_tokens_ratio"] = batches.measure(batches.QUICK)["multi_turn_tokens_ratio"]
        figures |= training_async.measure(steps=20, quick=quick)
    figures |= circumstances(quick)
    show("training", GOALS, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
