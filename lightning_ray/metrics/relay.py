"""The metrics of the relay: what it is at, and what was called and spent so far, by upstream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lightning_ray.metrics.exporter import Exporter

REPORT_SECONDS = 5.0
TOKENS = {"prompt": "prompt_tokens", "cached": "cached_tokens", "answered": "completion_tokens"}
"""Tag -> what the status calls them."""


async def report_relay(run: str, status: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """Export what ``RelayApp.status`` tells, every few seconds, until cancelled."""
    export = Exporter(run=run)
    while True:
        with contextlib.suppress(Exception):  # nobody is kept from an answer by a figure
            export_status(export, await status())
        await asyncio.sleep(REPORT_SECONDS)


def export_status(export: Exporter, status: Mapping[str, Any]) -> None:
    """Export once."""
    for upstream, told in status.items():
        for name in ("running", "waiting", "calls", "errors", "money"):
            export.set(f"relay_{name}", told[name], upstream=upstream)
        for kind, name in TOKENS.items():
            export.set("relay_tokens", told[name], upstream=upstream, kind=kind)
