"""The runner's end of one child: started and watched by the warden, killed with all its processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
from typing import Any

from lightning_ray.deaths.last_words import last_words
from lightning_ray.errors import AgentError, InfrastructureError
from lightning_ray.isolation import frames
from lightning_ray.isolation.interpreter import MARK as MARK
from lightning_ray.isolation.interpreter import specification
from lightning_ray.programs.output import BoundedText, Drain
from lightning_ray.programs.process import Ended, Running, Warden, wardens
from lightning_ray.running.failures import AgentFailed
from lightning_ray.store.packing import unpack_foreign
from lightning_ray.tracing.attempt import AttemptTrace
from lightning_ray.types import AttemptedRollout, NamedResources

MODULE = ["-m", "lightning_ray.isolation.child"]
KEPT_BYTES = 4096
"""Of the beginning, and of the end, of what a child prints during an attempt."""
END_SECONDS = 10.0
"""For a killed child to be gone."""


class ChildDiedError(InfrastructureError):
    """A child ended during an attempt."""


class ChildProcess:
    """One child; made by ``start``."""

    def __init__(self, warden: Warden, running: Running, line: socket.socket, output: Drain):
        self._warden = warden
        self._running = running
        self._line = line
        self._output = output
        self._hear: asyncio.StreamReader
        self._say: asyncio.StreamWriter

    @classmethod
    async def start(cls, agent: bytes, python: str | None = None) -> ChildProcess:
        """A child that has imported the (pickled) agent; of another interpreter on request.

        Raises AgentError if it could not, InfrastructureError if it died or was not started.
        """
        warden = wardens.here()
        output = Drain()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                files = [theirs.fileno(), output.write_end, output.write_end]
                running = await warden.start(specification(MODULE, python), files)
            finally:
                os.close(output.write_end)
        child = cls(warden, running, ours, output)
        try:
            child._hear, child._say = await asyncio.open_connection(sock=ours)
            child._say.write(frames.frame(frames.AGENT, agent))
            kind, body = await child._receive()
            if kind != frames.READY:
                where = "" if python is None else f" of python={python!r}"
                raise AgentError(f"the agent cannot be loaded in its process{where}: {body.decode(errors='replace')}")
        except BaseException:
            await child.kill()
            raise
        return child

    @property
    def alive(self) -> bool:
        """Whether it can play."""
        return not self._running.ended.done()

    async def play(self, rollout: AttemptedRollout, resources: NamedResources, trace: AttemptTrace) -> None:
        """Play one attempt, whose spans are recorded in ``trace``.

        Raises AgentFailed if the agent did, ChildDiedError if the process did. The child is of no use after anything
        but a return or AgentFailed.
        """
        self._output.kept = BoundedText(KEPT_BYTES)
        order = pickle.dumps((rollout, resources, (trace.trace_id, trace.root_id)), pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(ConnectionError):  # hearing tells why
            self._say.write(frames.frame(frames.PLAY, order))
            await self._say.drain()
        own = {"rollout_id": trace.rollout_id, "attempt_id": trace.attempt_id, "sequence_id": 0}
        while True:
            kind, body = await self._receive()
            told = self._read(body)
            if kind == frames.SPAN:
                with contextlib.suppress(RuntimeError):  # the attempt has ended meanwhile
                    trace.record({"span_id": "", "name": "", **told, **own})
                continue
            if told.get("status") == "failed":
                raise AgentFailed({"reason": "no reason given", **dict(told.get("metadata") or {})})
            return

    async def kill(self) -> None:
        """End it and all its processes."""
        self._warden.stop(self._running)
        await asyncio.wait({self._running.ended}, timeout=END_SECONDS)
        self._close()

    def _close(self) -> None:
        if hasattr(self, "_say"):
            self._say.close()
        else:
            self._line.close()
        self._output.close()

    def _read(self, body: bytes) -> dict[str, Any]:
        told = unpack_foreign(body)
        if not isinstance(told, dict):
            raise InfrastructureError(f"the agent's process said {told!r:.80}, which is no message")
        return told

    async def _receive(self) -> tuple[bytes, bytes]:
        try:
            return await frames.receive_frame(self._hear)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ChildDiedError(await self._cause()) from None
        except ValueError as error:
            raise InfrastructureError(f"the agent's process said {error}, which is no message") from None

    async def _cause(self) -> str:
        """Why it is gone: signal or exit code, and the last lines of its output."""
        done, _ = await asyncio.wait({self._running.ended}, timeout=END_SECONDS)
        if not done:
            return "the agent's process hung up"
        if (error := self._running.ended.exception()) is not None:
            return f"the agent's process was lost: {error}"
        await self._output.end(1.0)
        said = last_words(self._output.kept.text())
        said = f"; last lines of its output: {said}" if said else "; it printed nothing"
        return f"the agent's process {words(self._running.ended.result())}{said}"


def words(ended: Ended) -> str:
    """How a process ended."""
    if ended.code >= 0:
        return f"exited with code {ended.code}"
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-ended.code, f"signal {-ended.code}")
    size = f"at {ended.max_rss_bytes / 2**20:.0f} MiB"
    hint = ", by hand or for want of memory" if ended.code == -signal.SIGKILL else ""
    return f"was ended by {name}{hint} ({size})"
