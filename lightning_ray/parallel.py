"""The life of something that workers share: set up once, then in each worker, and torn down in reverse."""

from __future__ import annotations

from typing import Any


class ParallelWorkerBase:
    """Every step does nothing unless overridden. Names as in Agent Lightning 0.3."""

    worker_id: int | None = None

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Set up before there are workers."""

    def init_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Set up in a worker."""
        self.worker_id = worker_id

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Work."""

    def teardown_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Tear down in a worker."""

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Tear down after the workers."""
