"""What runs in a child: imports the agent once, then plays one attempt after the other, as it is told on its line.

Every span goes out as soon as it is recorded, so that what was emitted before a crash is kept. The line is the
process's standard input; the agent finds nothing there, and what it prints is shown by the runner if the child dies.
"""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import os
import pickle
import socket
import sys
import threading
import traceback
from typing import Any

from lightning_ray.agent import LitAgent, contained, name_of
from lightning_ray.emitter.exceptions import emit_exception
from lightning_ray.errors import StoreError
from lightning_ray.instrumentation import instrument_clients
from lightning_ray.isolation import frames
from lightning_ray.results import spans_of_result
from lightning_ray.running.calls import method_of
from lightning_ray.running.failures import metadata_of
from lightning_ray.tracing.attempt import AttemptTrace, Row, traced
from lightning_ray.types import AttemptedRollout, NamedResources


class Line:
    """The line to the runner; any thread may speak."""

    def __init__(self, connection: socket.socket):
        self.hear = connection.makefile("rb")
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, kind: bytes, body: bytes = b"") -> None:
        """Send a frame."""
        with self._lock:
            self._connection.sendall(frames.frame(kind, body))


class Child:
    """The agent and its event loop."""

    def __init__(self, agent: LitAgent[Any], line: Line):
        self._agent = agent
        self._line = line
        self._loop = asyncio.Runner()
        self._defect: StoreError | None = None

    def play(self, rollout: AttemptedRollout, resources: NamedResources, ids: tuple[str, str]) -> dict[str, Any]:
        """Play one attempt; how it ended."""
        self._defect = None
        trace_id, root_id = ids
        keys = (rollout.rollout_id, rollout.attempt.attempt_id)
        trace = AttemptTrace(*keys, trace_id=trace_id, root_id=root_id, listener=self._send)
        with traced(trace):
            try:
                spans_of_result(self._call(rollout, resources), trace, name_of(self._agent))
                if self._defect is not None:
                    raise self._defect
                end: dict[str, Any] = {"status": "succeeded"}
            except BaseException as error:
                emit_exception(error)
                end = {"status": "failed", "metadata": metadata_of(error)}
        trace.finish()
        return end

    def _call(self, rollout: AttemptedRollout, resources: NamedResources) -> Any:
        method = method_of(self._agent, rollout)
        arguments = (rollout.input, resources, rollout)
        if not self._agent.is_async():
            return contained(self._agent, method, *arguments)
        return self._loop.run(_alone(method(*arguments)), context=contextvars.copy_context())

    def _send(self, row: Row) -> None:
        try:
            body = frames.packed(row, f"span {row['name']!r}")
        except StoreError as error:
            self._defect = self._defect or error
        else:
            self._line.say(frames.SPAN, body)


async def _alone(agent: Any) -> Any:
    """The agent's result; what it left running is cancelled, so that the next attempt is alone."""
    try:
        return await agent
    finally:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


def serve(line: Line) -> None:
    """Until the runner hangs up."""
    _, body = frames.read_frame(line.hear)
    try:
        agent = pickle.loads(body)
        instrument_clients()
    except BaseException as error:
        words = traceback.format_exception_only(error)[-1].strip()
        line.say(frames.REFUSED, words.encode(errors="replace"))
        return
    child = Child(agent, line)
    line.say(frames.READY)
    while True:
        _, body = frames.read_frame(line.hear)
        line.say(frames.END, frames.packed(child.play(*pickle.loads(body)), "the end of an attempt"))


def main() -> None:
    """Take the line from standard input, and serve."""
    faulthandler.enable(all_threads=False)
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        serve(Line(connection))
    except (EOFError, ConnectionError):
        sys.exit(0)


if __name__ == "__main__":
    main()
