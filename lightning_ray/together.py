"""Several things at once, of which the first failure ends all."""

from __future__ import annotations

import asyncio
from typing import Any


async def together(*work: Any) -> list[Any]:
    """Await all; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
