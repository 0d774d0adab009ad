"""The model that criticises and edits: any endpoint that speaks OpenAI's chat API.

Either a client that was given, or an upstream of the run's relay, which counts what it costs. To the relay the
algorithm is the agent of a rollout of its own, so that its calls are in the span store as all others are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from openai import APIError, APIStatusError, AsyncOpenAI

from lightning_ray.algorithms.apo.state import Usage
from lightning_ray.capture.audience import audience_of
from lightning_ray.capture.keys import Claims, issue_key, operator_key
from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.store.base import Store
from lightning_ray.types import ProxyLLM

KEY_SECONDS = 30 * 86400.0
STATUS_SECONDS = 20.0
PAYMENT_REQUIRED = 402
REFUSED = (401, 403, 404)
"""Statuses that no retry and no other prompt will change: the key, or the model's name."""

Messages = Sequence[dict[str, str]]


class SpendReached(Exception):
    """The endpoint answers no more, as all that may be spent is spent."""


class Optimizer:
    """Asks; ``usage`` is added to with each answer.

    Args:
        client: an AsyncOpenAI, or what has its ``chat.completions.create``.
        temperature: of all calls.
        at_once: calls at once; further ones wait.
        timeout: seconds for a call, its retries included.
        usage: what was asked for before.
    """

    def __init__(self, client: Any, temperature: float, at_once: int, timeout: float, usage: Usage):
        self.usage = usage
        self._client = client
        self._temperature = temperature
        self._slots = asyncio.Semaphore(at_once)
        self._timeout = timeout
        self._spent: SpendReached | None = None

    async def ask(self, model: str, messages: Messages) -> str:
        """The text of the answer, "" if it has none.

        Raises SpendReached at the cap of the spend, ConfigError for a key or model that the endpoint does not know,
        InfrastructureError if it does not answer.
        """
        async with self._slots:
            if self._spent is not None:
                raise self._spent
            try:
                answer = await asyncio.wait_for(self._create(model, messages), self._timeout)
            except TimeoutError:
                raise InfrastructureError(f"model {model!r} did not answer within {self._timeout:g} s") from None
            except APIStatusError as error:
                meant = explained(error, model)
                self._spent = meant if isinstance(meant, SpendReached) else None
                raise meant from error
            except APIError as error:
                raise InfrastructureError(f"model {model!r} could not be asked: {error}") from error
        self.usage.calls += 1
        if (used := getattr(answer, "usage", None)) is not None:
            self.usage.prompt_tokens += used.prompt_tokens
            self.usage.completion_tokens += used.completion_tokens
        return (answer.choices[0].message.content or "").strip() if answer.choices else ""

    async def _create(self, model: str, messages: Messages) -> Any:
        return await self._client.chat.completions.create(
            model=model, messages=list(messages), temperature=self._temperature
        )


def explained(error: APIStatusError, model: str) -> Exception:
    """What an answer with an error's status means for the search."""
    if error.status_code == PAYMENT_REQUIRED:
        return SpendReached(error.message)
    if error.status_code in REFUSED:
        return ConfigError(
            f"the optimizing endpoint refused model {model!r} ({error.status_code}): {error.message}; look at its key, "
            "and at gradient_model and apply_edit_model"
        )
    return InfrastructureError(f"model {model!r} could not be asked ({error.status_code}): {error.message}")


@asynccontextmanager
async def through_relay(store: Store, llm: ProxyLLM, secret: bytes) -> AsyncIterator[AsyncOpenAI]:
    """A client of one of the relay's upstreams, as the agent of a rollout that lasts as long."""
    rollout = await store.start_rollout({"optimizer": llm.model}, metadata={"optimizer": llm.endpoint})
    ids = (rollout.rollout_id, rollout.attempt.attempt_id)
    key = issue_key(secret, Claims(*ids, time.time() + KEY_SECONDS, {}, audience_of(llm.endpoint)))
    client = AsyncOpenAI(base_url=llm.get_base_url(*ids), api_key=key)
    try:
        yield client
    finally:
        await client.close()
        await store.finish_attempt(*ids, "succeeded")


async def note_spend(usage: Usage, llm: ProxyLLM, secret: bytes) -> None:
    """Ask the relay what its upstream has cost, all its callers together; what is known stays if it does not answer."""
    address = f"{llm.endpoint.removesuffix('/v1')}/status"
    try:
        async with httpx.AsyncClient(timeout=STATUS_SECONDS) as http:
            answer = await http.get(address, headers={"x-api-key": operator_key(secret, STATUS_SECONDS)})
            status = answer.raise_for_status().json()
    except httpx.HTTPError:
        return
    usage.money, usage.max_spend = status["money"], status["max_spend"]
