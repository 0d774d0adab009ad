"""The engine half: knows what was sampled, under which weight version, whatever the wire API.

It stands in for ``AsyncLLM.generate`` under the engine's own serving classes, and for the output processor's
``process_outputs``, the one place that sees every token as it comes: before the next swap, and whether it is asked for
or not. Invariants: ids and logprobs are those of the engine's outputs; every token carries the version of the weights
that sampled it; nothing leaves the replica between a swap and its proof; an answer contains logprobs only if the client
asked for them.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
import zlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.capture.call import CapturedRequest, SampledSequence, current_request
from lightning_ray.capture.conversations import Conversations

FORCED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Sampling parameters that an attempt's key may fix; with all of them neutral, what is sampled is the policy itself."""

PROOF_DEADLINE = 120.0
"""Seconds that a running call waits for the proof of a swap."""


@dataclass
class RunningCall:
    """One call of the engine at work: what was sampled so far, by index of the sequence."""

    hides: bool
    """Whether the answer is to have no logprobs: then the engine need not make any for it."""
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    failure: str | None = None

    def take(self, state: Any, output: Any, version: int) -> SampledSequence:
        """Note what the engine core sampled for one sequence."""
        sequence = self.sequences.get(state.request_index)
        if sequence is None:
            sequence = self.sequences[state.request_index] = SampledSequence(state.prompt_token_ids or [])
            sequence.first_token = time.time()
        if ids := output.new_token_ids:
            logprobs = sampled_logprobs(ids, output.new_logprobs)
            if logprobs is None:
                self.failure = "the engine's logprobs are of other tokens than it sampled"
                return sequence
            sequence.sampled_ids += ids
            sequence.logprobs += logprobs
            sequence.weight_versions += [version] * len(ids)
        if self.hides:
            output.new_logprobs = None
        if output.finish_reason is not None:
            sequence.finish_reason = str(output.finish_reason)
        return sequence


class CapturedEngine:
    """Installs itself as ``engine.generate`` and keeps the weight version of every running call."""

    def __init__(self, engine: Any, version: int = 0, conversations: Conversations | None = None):
        self.engine = engine
        self.version = version
        self.conversations = conversations
        """With it, prompts that continue a conversation keep its sampled ids."""
        self.proved = asyncio.Event()
        self._generate = engine.generate
        self._process_outputs = engine.output_processor.process_outputs
        self._running: dict[str, RunningCall] = {}
        self._serial = itertools.count()
        self.reached = time.monotonic()
        """When a call last came to it."""
        engine.generate = self.generate
        engine.output_processor.process_outputs = self._take_and_process

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As ``AsyncLLM.generate``; what is sampled is added to the current request, if there is one."""
        request = current_request.get()
        if request is None:
            async for output in self._generate(prompt, sampling_params, request_id, **options):
                yield output
            return
        request.at_engine, self.reached = True, time.monotonic()
        sampling_params, hides = prepare(sampling_params, request)
        prompt, restored = await self._restored(request, prompt, sampling_params)
        # Clients may choose request ids, and choose the same one twice.
        request_id = f"{request_id}-{next(self._serial)}"
        call = self._running[request_id] = RunningCall(hides)

        def take_over() -> None:
            if request.running.pop(request_id, None) is None:
                return
            del self._running[request_id]
            for _, sequence in sorted(call.sequences.items()):
                sequence.restored_tokens = restored
                request.sequences.append(sequence)
                if self.conversations is not None and sequence.finish_reason is not None:
                    self.conversations.add(request.attempt, sequence.prompt_ids + sequence.sampled_ids)
            request.engine_ended()

        request.running[request_id] = take_over
        try:
            async for output in self._generate(prompt, sampling_params, request_id, **options):
                if not self.proved.is_set():
                    async with asyncio.timeout(PROOF_DEADLINE):
                        await self.proved.wait()
                if call.failure is not None:
                    raise RuntimeError(call.failure)
                if hides:
                    for completion in output.outputs:
                        completion.logprobs = completion.cumulative_logprob = None
                if output.finished:
                    take_over()
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            request.hung_up |= request_id in request.running
            raise
        except Exception:
            for sequence in call.sequences.values():
                sequence.finish_reason = None  # nobody gets it, and what sampled it may be unproved
            raise
        finally:
            take_over()

    async def _restored(self, request: CapturedRequest, prompt: Any, params: Any) -> tuple[Any, int]:
        """The prompt with the ids that were sampled where it continues a conversation, and how far that changed it."""
        if self.conversations is None or not request.continues or not is_plain(prompt):
            return prompt, 0
        given = prompt["prompt_token_ids"]
        ids = await self.conversations.restored(request.attempt, given)
        limit = self.engine.model_config.max_model_len
        if ids is given or len(ids) >= limit:
            return prompt, 0
        if params.max_tokens is not None:
            params.max_tokens = max(1, min(params.max_tokens, limit - len(ids)))
        return {**prompt, "prompt_token_ids": ids}, changed_until(given, ids)

    def _take_and_process(self, outputs: list[Any], *arguments: Any, **options: Any) -> Any:
        states = self.engine.output_processor.request_states
        taken: dict[str, tuple[SampledSequence, Any]] = {}
        for output in outputs:
            state = states.get(output.request_id)
            call = None if state is None else self._running.get(state.external_req_id)
            if call is not None:
                taken[output.request_id] = call.take(state, output, self.version), state
        processed = self._process_outputs(outputs, *arguments, **options)
        for sequence, state in taken.values():
            if sequence.cached_tokens is None:
                sequence.cached_tokens = state.num_cached_tokens
                sequence.queue_seconds = queue_seconds(state.stats)
        for name in processed.reqs_to_abort:  # ended by a string that the engine core does not look for
            if name in taken:
                sequence, state = taken[name]
                sequence.end("stop", len(state.detokenizer.output_token_ids))
        return processed

    def mark_swap(self, version: int) -> None:
        """From here on tokens belong to ``version``. Called while the scheduler is paused and its outputs flushed."""
        self.version = version

    async def flush(self) -> None:
        """Wait until every output that the paused engine produced has been processed."""
        queue = getattr(self.engine.engine_core, "outputs_queue", None)
        while queue is not None and not queue.empty():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    async def submitted(self, request_ids: Sequence[str]) -> None:
        """Wait until the engine core has been sent these requests (the present ones' outputs are not waited for)."""
        wanted = set(request_ids)
        for _ in range(1000):
            known = {state.external_req_id for state in self.engine.output_processor.request_states.values()}
            if wanted <= known:
                break
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
        return [entry[token].logprob for token, entry in zip(token_ids[1:], final.prompt_logprobs[1:], strict=True)]


def prepare(sampling_params: Any, request: CapturedRequest) -> tuple[Any, bool]:
    """The parameters the engine gets, and whether the logprobs must be hidden from the answer."""
    params = copy.copy(sampling_params)
    sampling = request.caller.sampling
    for name in FORCED:
        if name in sampling:
            setattr(params, name, sampling[name])
    if (seed := sampling.get("seed")) is not None:
        params.seed = call_seed(seed, f"{request.digest} {request.place}")
    if sampling:
        params.__post_init__()
    hides = params.num_logprobs is None
    if hides:
        params.logprobs = 0
    request.sampling_used = {name: getattr(params, name) for name in (*FORCED, "n", "stop", "max_tokens", "seed")}
    return params, hides


def call_seed(seed: int, call: str) -> int:
    """The seed of one call of a rollout that has one: another for each call, the same for the same."""
    return zlib.crc32(f"{seed} {call}".encode())


def is_plain(prompt: Any) -> bool:
    """Whether a prompt is of token ids alone: images and embeddings lie at places that must not move."""
    return isinstance(prompt, dict) and prompt.get("type", "token") == "token" and "prompt_token_ids" in prompt


def changed_until(before: Sequence[int], after: Sequence[int]) -> int:
    """How many leading ids there are until both are the same to their ends."""
    same = 0
    while same < min(len(before), len(after)) and before[-1 - same] == after[-1 - same]:
        same += 1
    return len(after) - same


def sampled_logprobs(ids: Sequence[int], lists: Any) -> list[float] | None:
    """The logprob of each sampled id, of the engine core's arrays: a position's sampled id comes first.

    None if they are of other tokens.
    """
    if lists is None or lists.logprob_token_ids[:, 0].tolist() != ids:
        return None
    found: list[float] = lists.logprobs[:, 0].tolist()
    return found


def queue_seconds(metrics: Any) -> float | None:
    """How long a request waited in the engine, by the engine's own clock, if it tells."""
    if metrics is None or not metrics.scheduled_ts:
        return None
    return float(metrics.scheduled_ts - metrics.queued_ts)
