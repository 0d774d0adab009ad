"""What a tracker is: it gets every row of a run's figures, and shows or keeps them.

A row is flat: ``kind`` (train, val, test), ``step``, and figures by name, some of them None or text. A tracker may
raise whatever it likes: ``group`` keeps that from the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Row = Mapping[str, Any]
LABELS = ("kind", "mode", "step")
"""Of a row, what says what its figures are of."""


@runtime_checkable
class Tracker(Protocol):
    """Where figures go."""

    def log(self, row: Row) -> None:
        """Take a row."""

    def close(self) -> None:
        """Make sure that all is kept. Called once, in the thread of ``log``."""


def scalars(row: Row) -> dict[str, float]:
    """The finite numbers of a row, by names that start with its kind, and with its mode where it has one:
    ``train/reward``, ``val/greedy/reward``.
    """
    prefix = "/".join(str(row[label]) for label in ("kind", "mode") if row.get(label) is not None)
    return {
        f"{prefix}/{name}": float(value)
        for name, value in row.items()
        if name not in LABELS and is_number(value) and math.isfinite(value)
    }


def is_number(value: Any) -> bool:
    """Whether it is one; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def remembered(folder: Path, tracker: str) -> Path:
    """The file that keeps the id which a tracker's service knows a run by, so that a resume continues it."""
    return folder / f".{tracker}-id"


def settings_of(folder: Path) -> dict[str, Any]:
    """The run's resolved settings."""
    file = folder / "config.json"
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return settings
