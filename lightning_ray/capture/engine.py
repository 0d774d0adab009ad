"""The engine half: knows what was sampled, under which weight version, whatever the wire API.

It stands in for ``AsyncLLM.generate`` under the engine's own serving classes. Invariants: ids and logprobs are
those of the engine's outputs; every token carries the version of the weights that sampled it; nothing leaves the
replica between a swap and its proof; an answer contains logprobs only if the client asked for them.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator
from typing import Any

from lightning_ray.capture.call import CapturedRequest, SampledSequence, current_request

FORCED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Sampling parameters that an attempt's key may fix; with all of them neutral, what is sampled is the policy itself."""

PROOF_DEADLINE = 120.0
"""Seconds that a running call waits for the proof of a swap."""


class CapturedEngine:
    """Installs itself as ``engine.generate`` and keeps the weight version of every running call."""

    def __init__(self, engine: Any, version: int = 0):
        self.engine = engine
        self.version = version
        self.proved = asyncio.Event()
        self._generate = engine.generate
        self._running: dict[str, list[tuple[dict[int, int], int]]] = {}
        """For each running request: at each swap, the tokens that each of its sequences had, and their version."""
        engine.generate = self.generate

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As ``AsyncLLM.generate``; records into the current request, if there is one."""
        request = current_request.get()
        if request is None:
            async for output in self._generate(prompt, sampling_params, request_id, **options):
                yield output
            return
        sampling_params, hide = prepare(sampling_params, request)
        boundaries = self._running.setdefault(request_id, [])
        sequences: dict[int, SampledSequence] = {}
        request.running += 1
        try:
            async for output in self._generate(prompt, sampling_params, request_id, **options):
                async with asyncio.timeout(PROOF_DEADLINE):
                    await self.proved.wait()
                if request.first_token is None:
                    request.first_token = time.time()
                record(output, sequences, sampling_params, hide)
                yield output
        finally:
            del self._running[request_id]
            for index, sequence in sorted(sequences.items()):
                sequence.weight_versions = versions(
                    len(sequence.sampled_ids), [(b.get(index, 0), v) for b, v in boundaries], self.version
                )
                request.sequences.append(sequence)
            request.running -= 1

    def mark_swap(self, version: int) -> None:
        """From here on tokens belong to ``version``. Called while the scheduler is paused and its outputs flushed."""
        processor = self.engine.output_processor
        for request_id, boundaries in self._running.items():
            counts: dict[int, int] = {}
            for internal_id in processor.external_req_ids.get(request_id, ()):
                state = processor.request_states.get(internal_id)
                if state is not None and state.detokenizer is not None:
                    counts[state.request_index] = state.detokenizer.num_output_tokens()
            boundaries.append((counts, self.version))
        self.version = version

    async def flush(self) -> None:
        """Wait until every output that the paused engine produced has been processed."""
        queue = getattr(self.engine.engine_core, "outputs_queue", None)
        while queue is not None and not queue.empty():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    async def prompt_logprobs(self, token_ids: list[int], request_id: str) -> list[float]:
        """log p(token | those before it) of tokens 1.. of a prompt, by the engine's own forward, not captured."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=1.0)
        final = None
        async for output in self._generate(TokensPrompt(prompt_token_ids=token_ids), parameters, request_id):
            final = output
        if final is None or final.prompt_logprobs is None:
            raise RuntimeError("the engine gave no prompt logprobs for the canary")
        return [
            entry[token].logprob for token, entry in zip(token_ids[1:], final.prompt_logprobs[1:], strict=True)
        ]


def prepare(sampling_params: Any, request: CapturedRequest) -> tuple[Any, bool]:
    """The parameters the engine gets, and whether the logprobs must be hidden from the answer."""
    params = copy.copy(sampling_params)
    for name in FORCED:
        if name in request.sampling:
            setattr(params, name, request.sampling[name])
    if request.sampling:
        params.__post_init__()
    hide = params.logprobs is None
    if hide:
        params.logprobs = 0
    request.sampling_used = {name: getattr(params, name) for name in (*FORCED, "n", "stop")}
    return params, hide


def record(output: Any, sequences: dict[int, SampledSequence], params: Any, hide: bool) -> None:
    """Add an output of the engine (delta, cumulative or final) to the sequences it belongs to."""
    from vllm.sampling_params import RequestOutputKind

    for completion in output.outputs:
        sequence = sequences.get(completion.index)
        if sequence is None:
            sequence = sequences[completion.index] = SampledSequence(list(output.prompt_token_ids or ()))
        ids = list(completion.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(ids, completion.logprobs or (), strict=True)]
        if params.output_kind == RequestOutputKind.DELTA:
            sequence.sampled_ids += ids
            sequence.logprobs += logprobs
        else:
            sequence.sampled_ids, sequence.logprobs = ids, logprobs
        if completion.finish_reason is not None:
            sequence.finish_reason = completion.finish_reason
        if hide:
            completion.logprobs = None
            completion.cumulative_logprob = None


def versions(count: int, boundaries: list[tuple[int, int]], last: int) -> list[int]:
    """The version of each of ``count`` tokens; a boundary (n, v) says that the first n tokens are of v or older."""
    result: list[int] = []
    for upto, version in boundaries:
        result += [version] * (min(upto, count) - len(result))
    return result + [last] * (count - len(result))
