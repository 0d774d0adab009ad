"""An engine that answers at once: ``AsyncLLM.generate`` replaced by one that gives what the engine would give.

Everything around it is vLLM's own. As from the engine there are logprobs only if they were asked for, one output for
final outputs, and one for each few tokens for deltas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

SAMPLED = 150
DELTA_TOKENS = 5


class StubEngine:
    """Stands in for ``engine.generate`` while ``is_stub``; ``seconds`` is how long sampling takes."""

    def __init__(self, engine: Any, sampled_ids: list[int]) -> None:
        tokenizer = engine.renderer.tokenizer
        self.is_stub = True
        self.seconds = 0.0
        self.in_flight = 0
        self.most_in_flight = 0
        self.sampled_ids = sampled_ids
        self._pieces = [tokenizer.decode([token]) for token in sampled_ids]
        self._real = engine.generate
        engine.generate = self.generate

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As ``AsyncLLM.generate``."""
        if not self.is_stub:
            async for output in self._real(prompt, sampling_params, request_id, **options):
                yield output
            return
        from vllm.sampling_params import RequestOutputKind

        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.in_flight -= 1
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        step = DELTA_TOKENS if is_delta else SAMPLED
        for first in range(0, SAMPLED, step):
            yield self._output(request_id, prompt["prompt_token_ids"], first, first + step, sampling_params)
            await asyncio.sleep(0)

    def _output(self, request_id: str, prompt_ids: list[int], first: int, end: int, params: Any) -> Any:
        from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs
        from vllm.outputs import CompletionOutput, RequestOutput

        ids, pieces = self.sampled_ids[first:end], self._pieces[first:end]
        logprobs = None
        if params.logprobs is not None:
            logprobs = create_sample_logprobs(params.flat_logprobs)
            for index, (token, piece) in enumerate(zip(ids, pieces, strict=True), first):
                append_logprobs_for_next_position(logprobs, [token], [logprob_of(index)], [piece], 1, params.logprobs)
        completion = CompletionOutput(
            index=0,
            text="".join(pieces),
            token_ids=ids,
            cumulative_logprob=None if logprobs is None else -1.0,
            logprobs=logprobs,
            finish_reason="length" if end == SAMPLED else None,
        )
        return RequestOutput(
            request_id, None, prompt_ids, None, [completion], finished=end == SAMPLED, num_cached_tokens=0
        )


def logprob_of(index: int) -> float:
    """The logprob of the stub's token of that index; a float32 holds it exactly."""
    return -(index + 1) / 64
