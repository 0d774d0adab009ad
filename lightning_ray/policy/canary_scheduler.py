"""Canaries before all others: a step of the engine that has canaries to run runs nothing else.

After a swap every request in flight computes its keys and values anew; a proof that had to share its step with them
would take as long as they do, and nobody is answered before it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from lightning_ray.policy.proof import CANARY


class _CanariesFirst:
    """Mixed into vLLM's schedulers."""

    waiting: Any
    skipped_waiting: Any
    running: list[Any]
    policy: Any

    def schedule(self, *args: Any, **options: Any) -> Any:
        """As vLLM's, on the canaries alone while there are any waiting and nothing runs, as after a swap: what runs has
        places and memory that they may need, and they are only next in line.
        """
        canaries = [request for request in self.waiting if request.request_id.startswith(CANARY)]
        if not canaries:
            return super().schedule(*args, **options)  # type: ignore[misc]
        waiting, skipped = self.waiting, self.skipped_waiting
        waiting.remove_requests(canaries)
        if self.running:
            for request in reversed(canaries):
                waiting.prepend_request(request)
            return super().schedule(*args, **options)  # type: ignore[misc]
        self.waiting, self.skipped_waiting = create_request_queue(self.policy), skipped.__class__()
        for request in canaries:
            self.waiting.add_request(request)
        try:
            return super().schedule(*args, **options)  # type: ignore[misc]
        finally:
            for request in (*self.waiting, *self.skipped_waiting):
                waiting.prepend_request(request)
            self.waiting, self.skipped_waiting = waiting, skipped


class CanariesFirst(_CanariesFirst, Scheduler):
    """Over vLLM's scheduler."""


class AsyncCanariesFirst(_CanariesFirst, AsyncScheduler):
    """Over vLLM's scheduler that plans a step while another runs."""


def with_canaries_first(scheduler_config: Any) -> None:
    """Have an engine of this configuration run canaries first."""
    chosen = scheduler_config.get_scheduler_cls()
    scheduler_config.scheduler_cls = {Scheduler: CanariesFirst, AsyncScheduler: AsyncCanariesFirst}.get(chosen, chosen)
