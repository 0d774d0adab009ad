"""Curves for TensorBoard, in files of the run's folder."""

from __future__ import annotations

from pathlib import Path

from lightning_ray.trackers.base import Row, scalars


class TensorBoardTracker:
    """Writes event files without TensorFlow or torch."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        # A thread of the writer's writes the file; its flush() does not wait for what is still queued.
        self._board = SummaryWriter(str(folder), flush_secs=1)

    def log(self, row: Row) -> None:
        """Add a point to each figure's curve."""
        for name, value in scalars(row).items():
            self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is queued."""
        self._board.close()
