"""Room for a run: there at once, waited for with a deadline, or refused with a message. Never silently pending.

fits what is free                        -> go on
fits what is there, or could be added    -> hold: placement groups ask for it, and tell the autoscaler; a line tells
                                            how long; when all are there, they make way for the parts themselves
fits neither                             -> ConfigError, before anything is started; unless there may be an autoscaler
                                            that did not tell what it could add: then it is waited for
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.placement.asks import Ask, countable
from lightning_ray.placement.packing import missing
from lightning_ray.placement.refusal import refusal
from lightning_ray.placement.view import View, look
from lightning_ray.threads import ask_ray
from lightning_ray.waiting import waiting

GRACE_SECONDS = 3.0
"""Ray takes a moment to see what was just given back."""
TELL_SECONDS = 20.0
"""Between two lines on what is waited for."""
POLL_SECONDS = 0.5
GROUP_SECONDS = 0.05


def check(asks: Sequence[Ask], view: View) -> bool:
    """Whether there is room now. Raises ConfigError if there can be none."""
    if not missing(asks, view.nodes):
        return True
    most = sum(ask.count * len(ask.bundles) for ask in asks)
    if not view.unknown and (never := missing(asks, view.grown(most), free=False)):
        raise ConfigError(refusal(asks, view, never))
    return False


async def make_room(asks: Sequence[Ask], view: View, wait_seconds: float, note: Callable[[str], None]) -> None:
    """Return once the asks have a place. Raises ConfigError if they cannot, or past ``wait_seconds``."""
    if check(asks, view):
        return
    held = [(ask, hold(ask)) for ask in asks for _ in range(ask.count)]
    began = time.monotonic()
    tell_at = GRACE_SECONDS
    try:
        while pending := [pair for pair in held if not is_there(pair[1])]:
            waited = time.monotonic() - began
            if waited > wait_seconds:
                now = await ask_ray(look, False)
                lacking = [(ask, ask.pieces * sum(each is ask for each, _ in pending)) for ask in asks]
                view = View(now.nodes, view.types, view.unknown)
                raise ConfigError(refusal(asks, view, [pair for pair in lacking if pair[1]], waited))
            if waited > tell_at:
                tell_at = waited + TELL_SECONDS
                note(
                    f"the cluster is full, or has to grow: waiting for room for {_counted(pending)}, "
                    f"since {waited:.0f} s of {wait_seconds:.0f} s"
                )
            await asyncio.sleep(POLL_SECONDS)
    finally:
        for _, group in held:
            let_go(group)


async def placed(ask: Ask, seconds: float) -> Any:
    """The placement group of one unit, in its place. Raises InfrastructureError if it finds none within ``seconds``."""
    group, deadline = hold(ask), time.monotonic() + seconds
    try:
        with waiting(f"a place for {ask.title}: {ask}"):
            while not is_there(group):
                if time.monotonic() > deadline:
                    view = await ask_ray(look, False)
                    raise InfrastructureError(refusal([ask], view, [(ask, ask.pieces)], seconds))
                await asyncio.sleep(GROUP_SECONDS)
    except BaseException:
        let_go(group)
        raise
    return group


def _counted(pending: Sequence[tuple[Ask, Any]]) -> str:
    counts: dict[str, int] = {}
    for ask, _ in pending:
        counts[ask.title] = counts.get(ask.title, 0) + 1
    return ", ".join(f"{count} x {title}" for title, count in counts.items())


def hold(ask: Ask) -> Any:
    """A placement group for one unit."""
    import ray

    selectors = [dict(ask.selector)] * len(ask.bundles) if ask.selector else None
    bundles = [countable(bundle) for bundle in ask.bundles]
    return ray.util.placement_group(bundles, strategy=ask.strategy, bundle_label_selector=selectors)


def is_there(group: Any) -> bool:
    """Whether a placement group has its place."""
    import ray

    return bool(ray.util.placement_group_table(group)["state"] == "CREATED")


def let_go(group: Any) -> None:
    """Give a placement group's place back."""
    import ray

    with contextlib.suppress(Exception):  # Ray may be gone
        ray.util.remove_placement_group(group)
