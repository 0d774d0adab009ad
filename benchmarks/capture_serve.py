"""How long does a call take through all of it, Serve's HAProxy, a replica and capture, against vLLM's app alone?"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from benchmarks.capture_client import request_of


class Path(NamedTuple):
    """Where calls of one token go, and by which keys, in turn."""

    url: str
    keys: tuple[str, ...]

    def requests(self, model: str) -> list[bytes]:
        """Completions of one token."""
        body = json.dumps({"model": model, "prompt": "the policy says", "max_tokens": 1}).encode()
        return [request_of(f"{self.url}/completions", key, body) for key in self.keys]


async def serve_path(
    client: Any,
    whole: Path,
    captured: Path,
    alone: Path,
    model: str,
    pairs: int,
    calls: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Windows in turn, the order changing; the first of each warms up and does not count."""
    paths = (whole, captured, alone)
    times: dict[Path, list[float]] = {path: [] for path in paths}
    for number in range(pairs + 1):
        for path in paths if number % 2 else paths[::-1]:
            window = await client.calls.remote(path.requests(model), 1, calls)
            times[path].append(1e3 * median(window.total))
        advance()
    ratios = [a / b for a, b in zip(times[whole][1:], times[alone][1:], strict=True)]
    return {
        "serve_path_ratio": round(median(ratios), 3),
        "serve_path_ms_p50": round(median(times[whole][1:]), 2),
        "serve_path_captured_app_ms_p50": round(median(times[captured][1:]), 2),
        "serve_path_bare_app_ms_p50": round(median(times[alone][1:]), 2),
    }
