"""An engine core that answers at once: requests end in it rather than in the real one, all around it is vLLM's own.

There are logprobs only if they were asked for. All tokens are in one output where only the final answer is wanted, and
a few in each where it is streamed.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

SAMPLED = 150
DELTA_TOKENS = 5


class StubEngine:
    """Stands in for the engine core while ``is_stub``; ``seconds`` is how long sampling takes."""

    def __init__(self, engine: Any, sampled_ids: list[int]) -> None:
        self.is_stub = True
        self.seconds = 0.0
        self.in_flight = 0
        self.most_in_flight = 0
        self.sampled_ids = sampled_ids
        self._core = engine.engine_core
        self._real = self._core.add_request_async
        self._tasks: set[asyncio.Task[None]] = set()
        self._core.add_request_async = self.add_request_async
        values = [[logprob_of(index)] for index in range(SAMPLED)]
        self._logprobs = (
            np.array([[token] for token in sampled_ids]),
            np.array(values, np.float32),
            np.ones(SAMPLED, np.int64),
        )

    async def add_request_async(self, request: Any) -> None:
        """As the engine core's client."""
        if not self.is_stub or request.sampling_params is None:
            await self._real(request)
            return
        task = asyncio.ensure_future(self._sample(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sample(self, request: Any) -> None:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreOutputs

        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.in_flight -= 1
        is_delta = request.sampling_params.output_kind == RequestOutputKind.DELTA
        step = DELTA_TOKENS if is_delta else SAMPLED
        for first in range(0, SAMPLED, step):
            output = self._output(request, first, first + step)
            self._core.outputs_queue.put_nowait(EngineCoreOutputs(outputs=[output]))
            await asyncio.sleep(0)

    def _output(self, request: Any, first: int, end: int) -> Any:
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.outputs import LogprobsLists

        ids, logprobs = self.sampled_ids[first:end], None
        if request.sampling_params.num_logprobs is not None:
            logprobs = LogprobsLists(*(each[first:end] for each in self._logprobs))
        finish = FinishReason.LENGTH if end == SAMPLED else None
        return EngineCoreOutput(request.request_id, list(ids), new_logprobs=logprobs, finish_reason=finish)


def logprob_of(index: int) -> float:
    """The logprob of the stub's token of that index; a float32 holds it exactly."""
    return -(index + 1) / 64
