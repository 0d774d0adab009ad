"""A run's applications end with the run, however it ends.

A run that ends in order deletes them. One whose driver was killed cannot, and on a Ray that outlives it Serve would
keep them for ever, with their GPUs. But Ray ends the actors that a driver owned, the span store among them: a replica
that finds it gone for good has its application deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError

from lightning_ray.threads import in_thread

CHECK_SECONDS = 5.0
"""Between two looks of a replica at its health and at the run's."""
ANSWER_SECONDS = 5.0

logger = logging.getLogger(__name__)


async def end_with(actors: Sequence[Any]) -> None:
    """Have the application of this replica deleted if an actor of the run's store is gone for good."""
    if await are_gone(actors):
        name = serve.get_replica_context().app_name
        logger.warning("the run of application %s is gone: it is deleted", name)
        await in_thread(partial(serve.delete, name, _blocking=False))


async def are_gone(actors: Sequence[Any]) -> bool:
    """Whether one of the store's actors has ended for good. One that is being restarted has not, nor one that is out of
    reach.
    """
    return any(await asyncio.gather(*(_is_gone(actor) for actor in actors)))


async def _is_gone(actor: Any) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await actor.process_id.remote()
    except ActorDiedError:
        return True
    except Exception as error:
        logger.info("the span store gives no sign of life: %s", error)
    return False
