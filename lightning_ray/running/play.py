"""One attempt on its way through a runner: playing -> ended or stopped -> told.

Whatever the agent does (returns, raises, returns nonsense, overruns its time, does not stop when told), the attempt
ends once, and the spans it emitted until then reach the store. A timeout is told at once; the agent is cancelled
meanwhile, and given the time to clean up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_ray.agent import LitAgent, name_of
from lightning_ray.emitter.exceptions import emit_exception
from lightning_ray.errors import StoreError
from lightning_ray.hooks import HookRunner
from lightning_ray.otel import format_exception_attributes
from lightning_ray.results import spans_of_result
from lightning_ray.running.calls import AgentCalls
from lightning_ray.running.failures import AgentFailed, metadata_of
from lightning_ray.running.reports import Reports, UnstorableError, storable
from lightning_ray.running.resources import ResourceBook
from lightning_ray.semconv import AGL_EXCEPTION
from lightning_ray.store.base import Finish
from lightning_ray.tracing.attempt import AttemptTrace, OpenSpan, Row, traced
from lightning_ray.types import AttemptedRollout

if TYPE_CHECKING:
    from lightning_ray.runner import Runner

CANCEL_SECONDS = 15.0
"""For an agent to end once it is cancelled: programs are given twelve."""
CANCEL_AGAIN = (1.0, 1.0, 1.0)
"""Then it is cancelled again, and waited for again."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    status: str
    metadata: dict[str, Any] | None = None


@dataclass
class Stage:
    """What attempts are played with."""

    runner: Runner
    agent: LitAgent[Any]
    calls: AgentCalls
    resources: ResourceBook
    reports: Reports
    hooks: HookRunner
    stuck: set[asyncio.Task[Any]] = field(default_factory=set)
    """Agents that were cancelled and did not end."""


class Play:
    """See the module."""

    def __init__(self, stage: Stage, rollout: AttemptedRollout):
        self.rollout = rollout
        self.key = (rollout.rollout_id, rollout.attempt.attempt_id)
        self.trace = AttemptTrace(*self.key)
        timeout = rollout.config.timeout_seconds
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.began = time.monotonic()
        self.failed_by_infrastructure = False
        self._stage = stage
        self._end: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        self.is_telling = False
        """Whether what is unsent is on its way to the store."""
        self._unsent: list[Row] = []
        self._defect: StoreError | None = None

    def stop(self) -> None:
        """The store has ended the attempt, or the runner stops: end the agent, and keep its spans."""
        self._settle(None)

    async def run(self) -> None:
        """From the start to the store's answer. Raises what the store raises."""
        work = asyncio.create_task(self._work(), name=self.key[1])
        work.add_done_callback(self._worked)
        timer = self._timer()
        try:
            outcome = await self._end
        finally:
            if timer is not None:
                timer.cancel()
            if not work.done():
                work.cancel()
        self.failed_by_infrastructure = outcome is not None and bool((outcome.metadata or {}).get("infrastructure"))
        if not work.done():
            told, _ = await asyncio.gather(self._tell(outcome), self._over(work), return_exceptions=True)
            outcome = None
            if isinstance(told, BaseException):
                raise told
        self.trace.finish()
        if self._stage.hooks.hooks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_SECONDS):
                    spans = self.trace.as_spans()
                    await self._stage.hooks.call("on_rollout_end", **self._here(), spans=spans)
        await self._tell(outcome)

    def take(self) -> list[Row]:
        """The spans that the store has not acknowledged yet."""
        self._unsent += self.trace.take()
        return list(self._unsent)

    def sent(self, rows: list[Row]) -> None:
        """The store has acknowledged what ``take`` gave."""
        known = {id(row) for row in rows}
        self._unsent = [row for row in self._unsent if id(row) not in known]

    def drop_unstorable(self) -> None:
        """Keep the spans that can be stored; the attempt fails for the others."""
        rows = self.take()
        self._unsent = storable(rows)
        if len(self._unsent) < len(rows) and self._defect is None:
            self._defect = StoreError(f"agent {name_of(self._stage.agent)!r} recorded a span that cannot be stored")

    def _here(self) -> dict[str, Any]:
        stage = self._stage
        return {"agent": stage.agent, "runner": stage.runner, "rollout": self.rollout}

    def _timer(self) -> asyncio.TimerHandle | None:
        seconds = self.rollout.config.timeout_seconds
        if seconds is None:
            return None
        outcome = Outcome("timeout", {"reason": f"ran longer than {seconds} s"})
        return asyncio.get_running_loop().call_later(seconds, self._settle, outcome)

    def _settle(self, outcome: Outcome | None) -> None:
        if not self._end.done():
            self._end.set_result(outcome)

    def _worked(self, work: asyncio.Task[Outcome]) -> None:
        if work.cancelled():
            self._settle(None)
        elif (error := work.exception()) is not None:
            self._settle(Outcome("failed", metadata_of(error)))
        else:
            self._settle(work.result())

    async def _work(self) -> Outcome:
        """The agent's part; everything in it belongs to the attempt."""
        stage = self._stage
        if stage.hooks.hooks:
            await stage.hooks.call("on_rollout_start", **self._here())
        with traced(self.trace):
            try:
                resources = await stage.resources.of(self.rollout)
                if stage.hooks.hooks:
                    await stage.hooks.call("on_trace_start", **self._here(), tracer=stage.runner.tracer)
                result = await stage.calls.call(self.rollout, resources, self.trace)
                if stage.hooks.hooks:
                    await stage.hooks.call("on_trace_end", **self._here(), tracer=stage.runner.tracer)
                spans_of_result(result, self.trace, name_of(stage.agent))
                return Outcome("succeeded")
            except AgentFailed as failure:
                return Outcome("failed", failure.metadata)
            except BaseException as error:
                if isinstance(error, GeneratorExit | asyncio.CancelledError) and being_cancelled():
                    raise
                emit_exception(error)
                return Outcome("failed", metadata_of(error))

    async def _over(self, work: asyncio.Task[Outcome]) -> None:
        """Wait for a cancelled agent's end, but not for ever."""
        await asyncio.wait([work], timeout=CANCEL_SECONDS)
        for seconds in CANCEL_AGAIN:
            if not work.done():
                work.cancel()
                await asyncio.wait([work], timeout=seconds)
        if not work.done():
            self._stage.stuck.add(work)
            work.add_done_callback(self._stage.stuck.discard)

    async def _tell(self, outcome: Outcome | None) -> None:
        """Tell the store of spans, and of the end unless it has been told."""
        if self._defect is not None and outcome is not None and outcome.status == "succeeded":
            outcome = self._failed_by(self._defect)
        rows = self.take()
        self.is_telling = True
        try:
            await self._report(outcome, rows)
        except UnstorableError as error:
            self._unsent = storable(rows)
            if outcome is not None and outcome.status == "succeeded":
                outcome = self._failed_by(error)
            rows = self.take()
            await self._report(outcome, rows)
        finally:
            self.is_telling = False
        self.sent(rows)

    async def _report(self, outcome: Outcome | None, rows: list[Row]) -> None:
        if outcome is None:
            await self._stage.reports.append(rows)
        else:
            await self._stage.reports.end(Finish(*self.key, outcome.status, outcome.metadata), rows)

    def _failed_by(self, error: StoreError) -> Outcome:
        span = OpenSpan(self.trace, AGL_EXCEPTION, format_exception_attributes(error))
        self._unsent.append(span.row(time.time(), "ERROR", str(error)))
        return Outcome("failed", metadata_of(error))


def being_cancelled() -> bool:
    """Whether this task is being cancelled; otherwise a CancelledError comes from inside the agent."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
