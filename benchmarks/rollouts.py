"""How many rollouts do runners play, what does tracing cost, and what is left when runners are killed?

    python -m benchmarks.rollouts            with 200 random kills (about 6 minutes on 2 cores)
    python -m benchmarks.rollouts --quick    with 20 (about 2 minutes)

Rates are medians of three windows, with every end durable in the span store before it counts. Times of recovery are the
worst of several kills. The last line of the output is one JSON object; ``kills`` says how many runners were killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys

from benchmarks.report import show
from benchmarks.rollout_figures import FULL, QUICK, measure
from benchmarks.store import Goal, bar, circumstances, cluster

GOALS = (
    Goal("rollouts_per_s_trivial", 400, least=True),
    Goal("rollouts_per_s_process", 40, least=True),
    Goal("tracing_us_per_call", 400),
    Goal("recovery_s_runner_kill", 5),
    Goal("lost", 0),
    Goal("duplicated", 0),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="20 random kills rather than 200, fewer rollouts")
    quick = arguments.parse_args().quick
    logging.getLogger("actors.runner_pool").setLevel(logging.ERROR)  # it tells of each death
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with cluster() as folder, contextlib.redirect_stdout(sys.stderr), bar() as progress:
        figures = asyncio.run(measure(folder, QUICK if quick else FULL, progress))
    figures |= circumstances(quick)
    show("rollouts", GOALS, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
