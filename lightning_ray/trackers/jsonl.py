"""metrics.jsonl: one JSON object for each row. A number that is not finite is null, as JSON has none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning_ray.trackers.base import Row


class JsonlTracker:
    """Appends lines to a file, which others may cut meanwhile."""

    def __init__(self, file: Path):
        self._file = file

    def log(self, row: Row) -> None:
        """Append a line."""
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
        with self._file.open("a") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Nothing is held."""


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
