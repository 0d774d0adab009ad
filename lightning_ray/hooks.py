"""Code of the user's at four moments of every attempt. Names and moments as in Agent Lightning 0.3."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_ray.parallel import ParallelWorkerBase

if TYPE_CHECKING:
    from lightning_ray.agent import LitAgent
    from lightning_ray.runner import Runner
    from lightning_ray.span import Span
    from lightning_ray.tracing.tracer import Tracer
    from lightning_ray.types import Rollout

Moment = Literal["on_rollout_start", "on_trace_start", "on_trace_end", "on_rollout_end"]

logger = logging.getLogger(__name__)


class Hook(ParallelWorkerBase):
    """Override what is needed; every moment does nothing otherwise."""

    async def on_rollout_start(self, *, agent: LitAgent[Any], runner: Runner, rollout: Rollout) -> None:
        """An attempt begins; nothing is traced yet."""

    async def on_trace_start(self, *, agent: LitAgent[Any], runner: Runner, tracer: Tracer, rollout: Rollout) -> None:
        """Inside of the attempt's trace, before the agent is called."""

    async def on_trace_end(self, *, agent: LitAgent[Any], runner: Runner, tracer: Tracer, rollout: Rollout) -> None:
        """Inside of the attempt's trace, after the agent has returned: what is emitted here still counts."""

    async def on_rollout_end(
        self, *, agent: LitAgent[Any], runner: Runner, rollout: Rollout, spans: list[Span]
    ) -> None:
        """The attempt is over, however it ended; ``spans`` are those recorded in the runner."""


class HookRunner:
    """Calls each hook in its order at each moment. What a hook raises is logged, and never the agent's failure."""

    def __init__(self, hooks: Sequence[Hook] | Hook | None = None):
        self.hooks: list[Hook] = [hooks] if isinstance(hooks, Hook) else list(hooks or ())

    async def call(self, moment: Moment, **arguments: Any) -> None:
        """One moment; the arguments are those of the hook's method. Cancelling it is not held up."""
        for hook in self.hooks:
            try:
                answer = getattr(hook, moment)(**arguments)
                if inspect.isawaitable(answer):
                    await answer
            except Exception:
                logger.exception("hook %s failed in %s", type(hook).__name__, moment)
