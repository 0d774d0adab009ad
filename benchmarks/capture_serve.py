"""How long does a call take through all of it, Serve's HAProxy, a replica and capture, against vLLM's app alone?"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from benchmarks.capture_client import request_of


class Path(NamedTuple):
    """Where a call of one token goes, and by which key."""

    url: str
    key: str

    def request(self, model: str) -> bytes:
        """Completions of one token."""
        body = {"model": model, "prompt": "the policy says", "max_tokens": 1}
        return request_of(f"{self.url}/completions", self.key, json.dumps(body).encode())


async def serve_path(
    client: Any, whole: Path, alone: Path, model: str, pairs: int, calls: int, advance: Callable[[], None]
) -> dict[str, Any]:
    """Windows in turn, the order changing; a first pair warms up and does not count."""
    times: dict[Path, list[float]] = {whole: [], alone: []}
    for number in range(pairs + 1):
        for path in (whole, alone) if number % 2 else (alone, whole):
            window = await client.calls.remote([path.request(model)], 1, calls)
            times[path].append(1e3 * median(window.total))
        advance()
    ratios = [a / b for a, b in zip(times[whole][1:], times[alone][1:], strict=True)]
    return {
        "serve_path_ratio": round(median(ratios), 3),
        "serve_path_ms_p50": round(median(times[whole][1:]), 2),
        "bare_app_ms_p50": round(median(times[alone][1:]), 2),
    }
