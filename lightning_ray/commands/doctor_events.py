"""The last events of a run, for ``lightning-ray doctor``: parts that died, and waits that took long."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 8


def show_events(events: Sequence[Mapping[str, Any]], console: Any) -> None:
    """Print the last deaths, and how often the run was late; nothing if there was neither."""
    deaths = [event for event in events if event["kind"] == "death"]
    if deaths:
        console.print(f"\n{len(deaths)} parts died; the last:", markup=False)
    for death in deaths[-SHOWN:]:
        console.print(f"  {_when(death)}  {death['role']} {death['name']}: {death['cause']}", markup=False)
    late = [event for event in events if event["kind"] == "waiting"]
    if late:
        console.print(f"\nLate {len(late)} times; the last, {_when(late[-1])}: {late[-1]['what']}", markup=False)
        for part in late[-1]["parts"]:
            console.print(f"  {part}", markup=False)


def _when(event: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
