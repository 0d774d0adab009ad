"""The engine half over a small engine that answers as vLLM's does: outputs are processed in one place, at once, and
asked for later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm.sampling_params")
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.outputs import LogprobsLists

from lightning_ray.capture import engine as engine_module
from lightning_ray.capture.address import Caller
from lightning_ray.capture.call import CapturedRequest, current_request
from lightning_ray.capture.conversations import Conversations
from lightning_ray.capture.engine import CapturedEngine, prepare

KINDS = [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE]


class Processor:
    """Hands new tokens to their requests, as vLLM's output processor."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def process_outputs(self, outputs: list[Any], timestamp: float | None = None) -> Any:
        stopped = []
        for output in outputs:
            state = self.request_states[output.request_id]
            state.num_cached_tokens = 1
            ids, finish = output.new_token_ids, output.finish_reason
            if state.stop in ids:
                ids, finish = ids[: ids.index(state.stop) + 1], "stop"
                stopped.append(output.request_id)
            state.tokens += ids
            state.new += ids
            state.entries += output.new_logprobs.logprobs[:, 0].tolist() if output.new_logprobs else []
            if finish is not None:
                state.finish_reason = finish
                del self.request_states[output.request_id]
            state.arrived.set()
        return SimpleNamespace(reqs_to_abort=stopped)


class Engine:
    """Samples what the test tells it to, by ``tokens``."""

    def __init__(self) -> None:
        self.output_processor = Processor()
        self.engine_core = SimpleNamespace()
        self.model_config = SimpleNamespace(max_model_len=100)
        self.prompts: list[Any] = []
        self.params: list[Any] = []
        self.failure: Exception | None = None
        self.by_name: dict[str, list[Any]] = {}
        self.live = 0

    def tokens(self, name: str, ids: list[int], finish: str | None = None, index: int = 0) -> None:
        """What the engine core sampled for one sequence; another's logprob is given with each."""
        state = self.by_name[name][index]
        lists = LogprobsLists(
            np.array([[token, 99] for token in ids]), np.array([[-token / 8, 0.0] for token in ids]), np.ones(len(ids))
        )
        output = SimpleNamespace(
            request_id=state.internal_id, new_token_ids=ids, finish_reason=finish, new_logprobs=lists
        )
        self.output_processor.process_outputs([output], timestamp=1.0)

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        self.params.append(params)
        self.prompts.append(prompt)
        if self.failure is not None:
            raise self.failure
        arrived = asyncio.Event()
        states = [
            SimpleNamespace(
                internal_id=f"{index}_{request_id}-internal",
                external_req_id=request_id,
                request_index=index,
                prompt_token_ids=prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt,
                num_cached_tokens=None,
                stats=None,
                stop=options.get("stop"),
                tokens=(tokens := []),
                detokenizer=SimpleNamespace(output_token_ids=tokens),
                new=[],
                entries=[],
                finish_reason=None,
                arrived=arrived,
            )
            for index in range(params.n)
        ]
        self.output_processor.request_states.update({state.internal_id: state for state in states})
        self.by_name[options.get("name", "call")] = states
        self.live += 1
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                ended = all(state.finish_reason for state in states)
                if params.output_kind == RequestOutputKind.FINAL_ONLY and not ended:
                    continue
                yield SimpleNamespace(
                    prompt_token_ids=prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt,
                    outputs=[self._completion(s, params) for s in states if s.new],
                    finished=ended,
                )
                for state in states:
                    state.new = []
                if ended:
                    return
        finally:
            self.live -= 1

    @staticmethod
    def _completion(state: Any, params: Any) -> Any:
        ids = list(state.new if params.output_kind == RequestOutputKind.DELTA else state.tokens)
        entries = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids, state.entries, strict=False)]
        return SimpleNamespace(
            index=state.request_index,
            token_ids=ids,
            logprobs=None if params.num_logprobs is None else entries,
            cumulative_logprob=-1.0,
            finish_reason=state.finish_reason,
        )


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    yield
    current_request.set(None)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def capture(engine: Engine) -> CapturedEngine:
    capture = CapturedEngine(engine, version=4)
    capture.proved.set()
    return capture


def captured(**sampling: Any) -> CapturedRequest:
    request = CapturedRequest(Caller("ro-1", "at-1", None, sampling), "chat", {"model": "policy"})
    current_request.set(request)
    return request


class Call:
    """A serving class that consumes one call of the engine, in a task of its own."""

    def __init__(
        self,
        engine: Any,
        params: Any,
        request_id: str = "id",
        prompt: Any = None,
        name: str = "call",
        stop: int | None = None,
    ):
        self.outputs: list[Any] = []
        self.engine = engine
        self._open = engine.generate(prompt or [1, 2], params, request_id, name=name, stop=stop)
        self.task = asyncio.create_task(self._consume())

    async def _consume(self) -> None:
        async for output in self._open:
            self.outputs.append(output)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("kind", KINDS)
async def test_ids_logprobs_and_versions_are_the_engines_whatever_the_kind(
    engine: Engine, capture: CapturedEngine, kind: RequestOutputKind
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=kind))
    await settle()
    assert not request.complete
    for ids, finish in (([5], None), ([6, 7], None), ([8], "stop")):
        engine.tokens("call", ids, finish)
        await settle()
    await call.task
    [sequence] = request.sequences
    assert request.complete
    assert (sequence.prompt_ids, sequence.sampled_ids) == ([1, 2], [5, 6, 7, 8])
    assert sequence.logprobs == [-5 / 8, -6 / 8, -7 / 8, -1.0]
    assert sequence.weight_versions == [4] * 4 and sequence.finish_reason == "stop"
    [span] = request.take_spans()
    assert (span["sampled_ids"], span["status"]) == ([5, 6, 7, 8], "OK")
    assert request.take_spans() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_logprobs_are_hidden_unless_asked_for(
    engine: Engine, capture: CapturedEngine, kind: RequestOutputKind
) -> None:
    for asked in (None, 0, 3):
        request = captured()
        call = Call(engine, SamplingParams(output_kind=kind, logprobs=asked))
        await settle()
        engine.tokens("call", [5], "stop")
        await call.task
        assert engine.params[-1].logprobs == (asked or 0)
        assert request.sequences[0].logprobs == [-5 / 8]
        [completion] = call.outputs[-1].outputs
        if asked is None:
            assert completion.logprobs is None and completion.cumulative_logprob is None
            assert engine.by_name["call"][0].entries == []  # made for nobody
        else:
            assert completion.logprobs[0][5].logprob == -5 / 8 and completion.cumulative_logprob == -1.0


async def test_logprobs_of_chosen_tokens_are_left_in_the_answer(engine: Engine, capture: CapturedEngine) -> None:
    params, hide = prepare(SamplingParams(logprob_token_ids=[3, 4]), captured())
    assert not hide and params.logprobs is None and params.num_logprobs == 2


def test_the_keys_parameters_win_and_the_clients_object_stays_as_it_was() -> None:
    given = SamplingParams(temperature=0.2, top_p=0.5, top_k=9, max_tokens=7, stop=["x"])
    request = captured(temperature=1.0, top_p=1.0, top_k=0)
    params, _ = prepare(given, request)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 7)
    assert (given.temperature, given.top_p, given.top_k, given.logprobs) == (0.2, 0.5, 9, None)
    assert request.sampling_used["temperature"] == 1.0 and request.sampling_used["stop"] == ["x"]


def test_without_fixed_parameters_the_clients_count() -> None:
    request = captured()
    params, _ = prepare(SamplingParams(temperature=0.25), request)
    assert params.temperature == 0.25 and request.sampling_used["temperature"] == 0.25


def test_greedy_is_really_greedy() -> None:
    params, _ = prepare(SamplingParams(temperature=1.0, top_p=0.9, top_k=5), captured(temperature=0.0, top_p=1.0))
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_each_of_several_choices_is_a_sequence(
    engine: Engine, capture: CapturedEngine, kind: RequestOutputKind
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(n=2, output_kind=kind))
    await settle()
    engine.tokens("call", [5], index=0)
    engine.tokens("call", [9, 9], "length", index=1)
    await settle()
    engine.tokens("call", [6], "stop", index=0)
    await call.task
    first, second = request.sequences
    assert (first.sampled_ids, first.finish_reason) == ([5, 6], "stop")
    assert (second.sampled_ids, second.finish_reason) == ([9, 9], "length")
    assert [span["sequence_id"] for span in request.take_spans()] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_carry_the_version_that_sampled_them(
    engine: Engine, capture: CapturedEngine, kind: RequestOutputKind
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=kind))
    await settle()
    engine.tokens("call", [5, 6])
    capture.mark_swap(5)
    engine.tokens("call", [7])
    capture.mark_swap(6)
    capture.mark_swap(7)
    engine.tokens("call", [8, 9], "stop")
    await call.task
    assert request.sequences[0].weight_versions == [4, 4, 5, 7, 7]
    assert capture.version == 7


@pytest.mark.parametrize("kind", KINDS)
async def test_a_choice_that_ended_before_a_swap_keeps_its_version(
    engine: Engine, capture: CapturedEngine, kind: RequestOutputKind
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(n=2, output_kind=kind))
    await settle()
    engine.tokens("call", [5], index=0)
    engine.tokens("call", [9, 9], "stop", index=1)
    capture.mark_swap(5)
    engine.tokens("call", [6], "stop", index=0)
    await call.task
    assert [s.weight_versions for s in request.sequences] == [[4, 5], [4, 4]]


async def test_an_answer_that_nobody_had_taken_at_the_swap_keeps_its_version(
    engine: Engine, capture: CapturedEngine
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY))
    await settle()
    engine.tokens("call", [5, 6], "stop")
    capture.mark_swap(5)
    await call.task
    assert request.sequences[0].weight_versions == [4, 4]


async def test_a_call_that_begins_after_the_swap_is_of_the_new_version(engine: Engine, capture: CapturedEngine) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY))
    capture.mark_swap(5)
    await settle()
    engine.tokens("call", [5, 6], "stop")
    await call.task
    assert request.sequences[0].weight_versions == [5, 5]


async def test_nothing_leaves_between_a_swap_and_its_proof(engine: Engine, capture: CapturedEngine) -> None:
    captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.DELTA))
    await settle()
    engine.tokens("call", [5])
    await settle()
    capture.proved.clear()
    capture.mark_swap(5)
    engine.tokens("call", [6])
    await settle()
    assert len(call.outputs) == 1
    capture.proved.set()
    await settle()
    assert len(call.outputs) == 2
    engine.tokens("call", [7], "stop")
    await call.task


@pytest.mark.parametrize("finish", [None, "stop"])
async def test_a_proof_that_never_comes_ends_the_call(
    engine: Engine, capture: CapturedEngine, monkeypatch: pytest.MonkeyPatch, finish: str | None
) -> None:
    monkeypatch.setattr(engine_module, "PROOF_DEADLINE", 0.01)
    capture.proved.clear()
    request = captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.DELTA))
    await settle()
    engine.tokens("call", [5], finish)
    with pytest.raises(TimeoutError):
        await call.task
    assert not request.running
    assert [span["status"] for span in request.take_spans()] == ["ERROR"]


async def test_an_engine_that_fails_leaves_no_sequence_and_nothing_running(
    engine: Engine, capture: CapturedEngine
) -> None:
    engine.failure = ValueError("prompt too long")
    request = captured()
    with pytest.raises(ValueError, match="prompt too long"):
        await Call(engine, SamplingParams()).task
    assert not request.sequences and not request.running and not request.complete
    capture.mark_swap(5)


async def test_a_call_that_is_cancelled_leaves_what_was_sampled(engine: Engine, capture: CapturedEngine) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.DELTA))
    await settle()
    engine.tokens("call", [5, 6])
    await settle()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    [sequence] = request.sequences
    assert (sequence.sampled_ids, sequence.weight_versions, sequence.finish_reason) == ([5, 6], [4, 4], None)
    assert request.take_spans()[0]["status"] == "ERROR"


async def test_a_call_given_up_before_its_only_output_leaves_what_was_sampled(
    engine: Engine, capture: CapturedEngine
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(n=2, output_kind=RequestOutputKind.FINAL_ONLY))
    await settle()
    engine.tokens("call", [5, 6], index=0)
    engine.tokens("call", [7], "stop", index=1)
    await settle()
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)
    assert [(s.sampled_ids, s.finish_reason) for s in request.sequences] == [([5, 6], None), ([7], "stop")]
    assert request.hung_up and [span["status"] for span in request.take_spans()] == ["ERROR", "ERROR"]


async def test_a_call_whose_last_output_was_taken_is_not_given_up(engine: Engine, capture: CapturedEngine) -> None:
    request = captured()
    taken = engine.generate([1, 2], SamplingParams(output_kind=RequestOutputKind.DELTA), "id", name="call")
    asked = asyncio.ensure_future(anext(taken))
    await settle()
    engine.tokens("call", [5], "stop")
    assert (await asked).finished
    await taken.aclose()
    assert not request.hung_up and request.take_spans()[0]["status"] == "OK"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_that_only_the_text_shows_ends_the_sequence(
    engine: Engine, capture: CapturedEngine, kind: RequestOutputKind
) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=kind), stop=8)
    await settle()
    engine.tokens("call", [5, 8, 9])
    await call.task
    [sequence] = request.sequences
    assert (sequence.sampled_ids, sequence.finish_reason) == ([5, 8], "stop")
    assert (sequence.logprobs, sequence.weight_versions) == ([-5 / 8, -1.0], [4, 4])


@pytest.mark.parametrize("wrong", ["missing", "other"])
async def test_logprobs_of_other_tokens_fail_their_call_alone(
    engine: Engine, capture: CapturedEngine, wrong: str
) -> None:
    captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.DELTA))
    await settle()
    [state] = engine.by_name["call"]
    lists = None if wrong == "missing" else LogprobsLists(np.array([[6]]), np.zeros((1, 1)), np.ones(1))
    output = SimpleNamespace(request_id=state.internal_id, new_token_ids=[5], finish_reason=None, new_logprobs=lists)
    engine.output_processor.process_outputs([output])
    with pytest.raises(RuntimeError, match="of other tokens than it sampled"):
        await call.task


async def test_a_call_left_in_the_middle_can_be_settled_once(engine: Engine, capture: CapturedEngine) -> None:
    request = captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.DELTA))
    await settle()
    engine.tokens("call", [5])
    await settle()
    request.settle()
    assert request.complete and [s.sampled_ids for s in request.sequences] == [[5]]
    engine.tokens("call", [6], "stop")
    await call.task
    assert len(request.sequences) == 1


async def test_two_requests_under_one_client_chosen_id_do_not_mix(engine: Engine, capture: CapturedEngine) -> None:
    async def one(name: str, prompt: list[int]) -> CapturedRequest:
        request = captured()
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        await Call(engine, params, "chosen-by-the-client", prompt, name).task
        return request

    tasks = [asyncio.create_task(one(name, [number])) for number, name in enumerate("ab")]
    await settle()
    engine.tokens("a", [5, 5], "stop")
    engine.tokens("b", [6])
    await settle()
    capture.mark_swap(5)
    engine.tokens("b", [7], "stop")
    a, b = await asyncio.gather(*tasks)
    assert [(s.prompt_ids, s.sampled_ids, s.weight_versions) for s in a.sequences] == [([0], [5, 5], [4, 4])]
    assert [(s.prompt_ids, s.sampled_ids, s.weight_versions) for s in b.sequences] == [([1], [6, 7], [4, 5])]


async def test_a_call_outside_of_a_request_is_left_alone(engine: Engine, capture: CapturedEngine) -> None:
    current_request.set(None)
    params = SamplingParams(temperature=0.3)
    call = Call(engine, params)
    await settle()
    engine.tokens("call", [5], "stop")
    await call.task
    assert engine.params == [params] and params.logprobs is None


class Letters:
    """Every id is as many letters as it says; 0 stands for itself."""

    all_special_ids = (0,)

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("x" * token if token else "|" for token in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 if letter == "x" else 0 for letter in text]


async def say(engine: Engine, prompt: Any, sampled: list[int], finish: str | None = "stop", **options: Any) -> Any:
    """One whole call; what the engine was given."""
    params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **options)
    call = Call(engine, params, prompt=prompt)
    await settle()
    engine.tokens("call", sampled, finish)
    await call.task
    return engine.prompts[-1]


@pytest.fixture
def continuing(engine: Engine) -> CapturedEngine:
    capture = CapturedEngine(engine, version=4, conversations=Conversations(Letters()))  # type: ignore[arg-type]
    capture.proved.set()
    return capture


async def test_a_prompt_that_continues_keeps_the_ids_that_were_sampled(
    engine: Engine, continuing: CapturedEngine
) -> None:
    first = captured()
    await say(engine, {"type": "token", "prompt_token_ids": [0, 5]}, [2, 2, 0])
    assert "restored_tokens" not in first.take_spans()[0]["attributes"]
    request = captured()
    request.continues = True
    given = {"type": "token", "prompt_token_ids": [0, 5, 3, 1, 0, 7], "cache_salt": "kept"}
    found = await say(engine, given, [1], max_tokens=98)
    assert found == {**given, "prompt_token_ids": [0, 5, 2, 2, 0, 7]} and given["prompt_token_ids"][2] == 3
    assert engine.params[-1].max_tokens == 94
    [span] = request.take_spans()
    assert span["prompt_ids"] == [0, 5, 2, 2, 0, 7] and span["attributes"]["restored_tokens"] == 4


async def test_a_prompt_is_left_as_it_is_where_ids_must_not_move(engine: Engine, continuing: CapturedEngine) -> None:
    captured()
    await say(engine, {"type": "token", "prompt_token_ids": [0, 5]}, [2, 2, 0])
    ids = [0, 5, 4, 0, 7]
    for continues, prompt in (
        (False, {"type": "token", "prompt_token_ids": ids}),
        (True, {"type": "multimodal", "prompt_token_ids": ids}),
        (True, {"type": "token", "prompt_token_ids": [0, 6, 0]}),
        (True, {"type": "token", "prompt_token_ids": [0, 5, 4, 0, 0, *[1] * 94]}),
    ):
        request = captured()
        request.continues = continues
        assert await say(engine, prompt, [1]) is prompt
        assert "restored_tokens" not in request.take_spans()[0]["attributes"]


async def test_what_was_broken_off_is_no_part_of_the_conversation(engine: Engine, continuing: CapturedEngine) -> None:
    captured()
    call = Call(engine, SamplingParams(output_kind=RequestOutputKind.DELTA), prompt={"prompt_token_ids": [0, 5]})
    await settle()
    engine.tokens("call", [2, 2])
    await settle()
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)
    request = captured()
    request.continues = True
    prompt = {"prompt_token_ids": [0, 5, 4, 0, 7]}
    assert await say(engine, prompt, [1]) is prompt


async def test_the_end_is_told_once_every_call_of_the_engine_has_ended(engine: Engine, capture: CapturedEngine) -> None:
    request = captured()
    told: list[int] = []
    request.ended = lambda: told.append(len(request.sequences))
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    calls = [Call(engine, params, name=name) for name in "ab"]
    await settle()
    engine.tokens("a", [5], "stop")
    await settle()
    assert told == []
    engine.tokens("b", [6], "stop")
    await settle()
    assert told == [2]
    await asyncio.gather(*(call.task for call in calls))


def test_a_rollouts_seed_gives_each_call_its_own() -> None:
    seeds = []
    for digest, place, seed in (("a", 0, 7), ("a", 1, 7), ("b", 0, 7), ("a", 0, 8), ("a", 0, 7)):
        request = captured(seed=seed)
        request.digest, request.place = digest, place
        seeds.append(prepare(SamplingParams(seed=1), request)[0].seed)
    assert len(set(seeds)) == 4 and seeds[0] == seeds[-1]
    assert prepare(SamplingParams(seed=1), captured())[0].seed == 1
