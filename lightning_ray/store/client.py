"""Clients of the span store, with the same async calls: on a Ray actor, and in-process.

Every call may be resent: clients choose the ids, so that a call whose answer was lost is answered alike. A
StoreClient does so by itself while the actor restarts, until its deadline; then it raises
InfrastructureError. How calls share messages is ``post``'s matter, what travels ``wire``'s.
"""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from lightning_ray.errors import InfrastructureError, LightningRayError
from lightning_ray.store.base import Store
from lightning_ray.store.core import SpanStore
from lightning_ray.store.post import Call, Post
from lightning_ray.store.service import StoreService
from lightning_ray.store.wire import decode, encode, raise_outcome

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_SLOW_CALLS = frozenset({"scan_spans", "sql", "tables", "compact"})


class LocalStoreClient(Store):
    """A store in this process and event loop: for tests and for runs without Ray.

    What it takes and gives are copies, as if they had travelled.
    """

    def __init__(self, store: SpanStore) -> None:
        self._service = StoreService(store)

    async def close(self) -> None:
        """Make all durable and let go of the folder."""
        await self._service.close()

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        sent = decode(*encode(args, name))
        answer = await self._service.call(name, *sent, timeout=timeout)
        return decode(*encode(answer, f"the answer of {name}"))


class StoreClient(Store):
    """A store behind a Ray actor (``actors.span_store``). Works wherever Ray does, and can be pickled.

    ``deadline`` is how many seconds a call may go without an answer, beyond the time it asked to wait. Without ``line``
    all goes through Ray, as it does from another machine.
    """

    def __init__(self, handle: Any, deadline: float = 120.0, *, line: bool = True) -> None:
        self._handle = handle
        self._deadline = deadline
        self._has_line = line
        self._posts: WeakKeyDictionary[asyncio.AbstractEventLoop, Post] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), line=self._has_line), (self._handle, self._deadline)

    @property
    def actors(self) -> list[Any]:
        return [self._handle]

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

        if timeout and name == "dequeue_many_rollouts" and (claims := await self._call(name, *args, timeout=0.0)):
            return claims  # to wait takes a message of its own through Ray
        message, buffers = encode([name, args], name)
        end = time.monotonic() + self._deadline + (timeout or 0.0)
        wait_end = None if timeout is None else time.monotonic() + timeout
        pause, cause = _FIRST_PAUSE, "no answer"
        while (left := end - time.monotonic()) > 0:
            timeout = None if wait_end is None else max(0.0, wait_end - time.monotonic())
            apart = bool(timeout) or name in _SLOW_CALLS
            try:
                answer = await asyncio.wait_for(self._post().send(Call(message, buffers, timeout), apart), left)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, LightningRayError) else error) from None
            except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
                cause = str(error).strip() or type(error).__name__
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    break
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.0), max(0.0, end - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE)
            except TimeoutError:
                break
            else:
                outcome, value = decode(*answer)
                if outcome is not None:
                    raise_outcome(outcome)
                return value
        raise InfrastructureError(
            f"the span store cannot answer {name} (deadline {self._deadline} s): {cause}; see its actor's log"
        )

    def _post(self) -> Post:
        loop = asyncio.get_running_loop()
        post = self._posts.get(loop)
        if post is None:
            for ended in [other for other in self._posts if other.is_closed()]:
                del self._posts[ended]
            post = self._posts[loop] = Post(self._handle, self._has_line)
        return post
