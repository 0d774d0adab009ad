"""Tells what everyone is at when a run takes longer than it should: a line for each part, again and again, ever rarer.

A step is late after a minute, or five times what steps took so far (the median). Before the first step, something is
late when one wait lasts two minutes. Nothing is ended by this: each wait has a deadline of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median
from typing import Any

from lightning_ray.waiting import oldest_wait, open_waits

CHECK_SECONDS = 2.0
STEP_SECONDS = 60.0
START_SECONDS = 120.0
TIMES_MEDIAN = 5.0
STEPS_KEPT = 50
ANSWER_SECONDS = 5.0
"""For a part to say what it is at."""

Look = Callable[[], Awaitable[str]]


class Lateness:
    """Of one run.

    Args:
        tell: what becomes of a title and its lines.
        looks: by part, what says in a line what it is at.
    """

    def __init__(
        self,
        tell: Callable[[str, Sequence[str]], None],
        looks: Mapping[str, Look],
        now: Callable[[], float] = time.monotonic,
    ):
        self._tell = tell
        self._looks = looks
        self._now = now
        self._began: float | None = None
        """Of the present step; None before the first."""
        self._step = 0
        self._seconds: deque[float] = deque(maxlen=STEPS_KEPT)
        self._told = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look from now on."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    def step(self, number: int, seconds: float | None = None) -> None:
        """Step ``number`` begins; the one before took ``seconds``, if there was one."""
        self._began, self._step, self._told = self._now(), number, 0
        if seconds is not None:
            self._seconds.append(seconds)

    def limit(self) -> float:
        """Seconds after which the present step, or the start, is late; twice as many each time that it was told."""
        first = START_SECONDS if self._began is None else STEP_SECONDS
        usual = TIMES_MEDIAN * median(self._seconds) if self._seconds else 0.0
        return max(first, usual) * 2**self._told

    def late(self) -> str | None:
        """The title, if it is time to tell."""
        since = oldest_wait() if self._began is None else self._began
        if since is None or (lasts := self._now() - since) < self.limit():
            return None
        if self._began is None:
            return f"the start of the run waits since {lasts:.0f} s"
        usually = f"; steps took {median(self._seconds):.0f} s so far" if self._seconds else ""
        return f"step {self._step} lasts {lasts:.0f} s{usually}. What everyone is at:"

    async def report(self) -> list[str]:
        """A line for each wait and for each part."""
        answers = await asyncio.gather(*(self._ask(part, look) for part, look in self._looks.items()))
        return [*(f"waits for {line}" for line in open_waits()), *answers]

    async def _ask(self, part: str, look: Look) -> str:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return f"{part}: {await look()}"
        except TimeoutError:
            return f"{part}: no answer within {ANSWER_SECONDS:.0f} s"
        except Exception as error:
            return f"{part}: {type(error).__name__}: {str(error).strip()[:200]}"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if (title := self.late()) is not None:
                self._told += 1
                self._tell(title, await self.report())


async def rollouts_at_work(store: Any) -> str:
    """Rollouts by state, and the one that is played longest."""
    known = await store.statistics()
    states = ", ".join(f"{count} {status}" for status, count in known["rollouts_by_status"].items() if count)
    running = (await store.query_rollouts(status_in=["running"], sort_by="start_time", limit=1)).items
    if not running:
        return states or "none"
    attempt = running[0].attempt
    lasts = time.time() - attempt.start_time
    return f"{states}; longest: {running[0].rollout_id}, since {lasts:.0f} s on {attempt.worker_id}"


def runners_at_work(status: Sequence[Mapping[str, Any]]) -> str:
    """Runners that are up, with what they play, and those that are starting; see ``RunnerPool.status``."""
    up = [f"{each['name']} plays {each['playing']}" for each in status if each["pid"] is not None]
    starting = [each["name"] for each in status if each["pid"] is None]
    shown = ", ".join([*up[:8], *([f"{len(up) - 8} more"] if len(up) > 8 else [])])
    return f"{len(up)} up ({shown})" + (f"; starting, or waiting for a CPU: {', '.join(starting)}" if starting else "")


def replicas_at_work(answers: Sequence[Mapping[str, Any]]) -> str:
    """Replicas with their calls, versions and swaps; see ``Policy.status``."""
    now = time.time()
    told = []
    for each in answers:
        since = each.get("swapping_since")
        swap = f", a swap open since {now - since:.0f} s" if since else ", asleep" if each["swapping"] else ""
        proved = "" if each["proved"] else ", not proved"
        calls = f"{each['running']} calls running, {each['waiting']} waiting"
        call = each.get("oldest_call")
        oldest = f", its oldest call {call['stage']} after {call['seconds']:.0f} s" if call else ""
        told.append(f"{each['replica_id']} {calls}{oldest}, version {each['version']}{proved}{swap}")
    return "; ".join(told) or "none is up"
