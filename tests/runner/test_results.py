"""Whatever the agent does, its attempt ends once, with its spans."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openai
import pytest

import lightning_ray as lr
from lightning_ray.types import EnqueueRolloutRequest as Request
from tests.runner.parts import agent_of, both, play, rewards_of, spans_of


@both
@pytest.mark.parametrize("reward", [0.5, 1, True, np.float32(0.5), np.float64(1.0)])
async def test_a_returned_number_is_the_reward(store: Any, is_async: bool, reward: Any) -> None:
    [rollout] = await play(store, agent_of(lambda: reward, is_async))
    assert rollout.status == "succeeded" and await rewards_of(store, rollout) == [float(reward)]


@both
async def test_an_agent_may_emit_its_rewards_and_return_none(store: Any, is_async: bool) -> None:
    def emitting() -> None:
        lr.emit_annotation({"step": 1})
        lr.emit_reward(0.25)

    [rollout] = await play(store, agent_of(emitting, is_async))
    spans = await spans_of(store, rollout)
    assert rollout.status == "succeeded" and await rewards_of(store, rollout) == [0.25]
    assert [span.sequence_id for span in spans] == [1, 2] and spans[0].attributes == {"step": 1}


@both
async def test_nothing_returned_and_nothing_emitted_is_no_reward(store: Any, is_async: bool) -> None:
    [rollout] = await play(store, agent_of(lambda: None, is_async))
    assert rollout.status == "succeeded" and await spans_of(store, rollout) == []


async def test_a_reward_of_several_dimensions_is_emitted(store: Any) -> None:
    [rollout] = await play(
        store, agent_of(lambda: lr.emit_reward({"a": 1.0, "b": 2.0}, primary_key="b") and None, True)
    )
    assert await rewards_of(store, rollout) == [2.0]


@both
@pytest.mark.parametrize("result", ["0.5", {"a": 1.0, "b": 2.0}, [1.0], object()])
async def test_any_other_result_fails_and_says_what_to_return(store: Any, is_async: bool, result: Any) -> None:
    [rollout] = await play(store, agent_of(lambda: result, is_async))
    assert rollout.status == "failed" and rollout.metadata is not None
    failure = rollout.metadata["failure"]
    assert failure["kind"] == "failed"
    assert re.search(f"agent' returned (a )?{type(result).__name__}", failure["reason"])
    assert "return a number" in failure["reason"]


def quit_early() -> None:
    sys.exit("bye")


def cancelled_inside() -> None:
    raise asyncio.CancelledError("a scope inside the agent")


def divide() -> None:
    lr.emit_annotation({"reached": 1})
    raise ZeroDivisionError("by zero")


@both
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (divide, "ZeroDivisionError: by zero"),
        (quit_early, "SystemExit: bye"),
        (cancelled_inside, "CancelledError: a scope inside the agent"),
    ],
)
async def test_an_agent_that_raises_fails_its_attempt_and_the_runner_goes_on(
    store: Any, is_async: bool, broken: Callable[[], Any], reason: str
) -> None:
    turns = iter([broken, lambda: 1.0])
    failed, well = await play(
        store, agent_of(lambda: next(turns)(), is_async), *[Request(input={}) for _ in range(2)], concurrency=1
    )
    assert failed.status == "failed" and failed.metadata == {"failure": {"kind": "failed", "reason": reason}}
    *_, last = await spans_of(store, failed)
    assert last.name == "agentlightning.exception" and last.status.status_code == "ERROR"
    assert last.attributes["exception.type"] == reason.split(":")[0]
    assert well.status == "succeeded"


async def test_what_was_emitted_before_an_exception_is_kept(store: Any) -> None:
    [rollout] = await play(store, agent_of(divide, True))
    assert [span.attributes.get("reached") for span in await spans_of(store, rollout)] == [1, None]


async def test_an_annotation_that_cannot_be_stored_fails_the_attempt_by_name(store: Any) -> None:
    def emitting() -> float:
        lr.emit_annotation({"fine": 1})
        lr.emit_annotation({"bad": object()})
        return 1.0

    [rollout] = await play(store, agent_of(emitting, True))
    assert rollout.status == "failed" and rollout.metadata is not None
    assert "attribute 'bad' is object" in rollout.metadata["failure"]["reason"]
    assert [span.name for span in await spans_of(store, rollout)][-1] == "agentlightning.exception"
    assert (await spans_of(store, rollout))[0].attributes == {"fine": 1}


def response_error(status: int) -> openai.APIStatusError:
    response: Any = SimpleNamespace(request=None, status_code=status, headers={})
    return openai.APIStatusError("no", response=response, body=None)


@pytest.mark.parametrize(
    ("error", "infrastructure"),
    [
        (openai.APIConnectionError(request=cast(Any, None)), True),
        (response_error(503), True),
        (response_error(400), False),
        (response_error(500), True),
    ],
)
async def test_an_endpoint_that_is_gone_is_not_the_agents_fault(
    store: Any, error: Exception, infrastructure: bool
) -> None:
    def lost() -> None:
        raise error

    [rollout] = await play(store, agent_of(lost, True))
    assert rollout.metadata is not None
    assert rollout.metadata["failure"]["kind"] == ("infrastructure" if infrastructure else "failed")
    attempts = await store.query_attempts(rollout.rollout_id)
    assert len(attempts) == (6 if infrastructure else 1)
