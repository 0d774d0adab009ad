"""One request to the store's HTTP API: its parts, read and checked as its handler asks for them.

Invariant: what is missing or wrong ends in a Refusal that names the field and shows the value. A call notes the ids
that it names, so that it can be told afterwards whether a refusal was for one that the store does not know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from lightning_ray.store.base import Store
from lightning_ray.store.http.bodies import Refusal, decode, decode_arrow, media_type, read_body
from lightning_ray.store.http.media import ARROW
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.types import NamedResources, Span

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
_RESOURCES: TypeAdapter[NamedResources] = TypeAdapter(NamedResources)
_SPANS: TypeAdapter[list[Span]] = TypeAdapter(list[Span])
_SHOWN = 80
"""Letters of a wrong value that are shown."""


class Call:
    """One request, read and checked as its handler asks for it; notes which ids it names."""

    def __init__(self, store: Store, request: Request, max_body_bytes: int) -> None:
        self.store = store
        self.request = request
        self.rollouts: list[str] = []
        self.attempts: list[tuple[str, str]] = []
        self.resources: list[str] = []
        self._limit = max_body_bytes
        if rollout_id := self.path("rollout_id"):
            self.rollouts.append(rollout_id)
            if (attempt_id := self.path("attempt_id")) and attempt_id != "latest":
                self.attempts.append((rollout_id, attempt_id))

    def path(self, name: str) -> str:
        """An id in the path; empty if the path has none."""
        return unquote(self.request.path_params.get(name, ""))

    async def body(self, model: type[M]) -> M:
        """The body; none counts as ``{}``. Raises Refusal naming the fields that are missing or wrong."""
        body = decode(await read_body(self.request, self._limit), media_type(self.request))
        return _checked(TypeAdapter(model), {} if body is None else body)

    async def resources_body(self) -> NamedResources:
        """Resources by name."""
        body = decode(await read_body(self.request, self._limit), media_type(self.request))
        return _checked(_RESOURCES, body)

    async def spans_body(self) -> Span | pa.RecordBatch:
        """One span, or a batch of many: a list, or an Arrow stream."""
        body, kind = await read_body(self.request, self._limit), media_type(self.request)
        if kind == ARROW:
            batch = decode_arrow(body)
        else:
            data = decode(body, kind)
            if not isinstance(data, list):
                span = _checked(TypeAdapter(Span), data)
                self.name_attempts([(span.rollout_id, span.attempt_id)])
                return span
            batch = spans_of_list(data)
        self.name_spans(batch)
        return batch

    def query(self, model: type[M]) -> M:
        """The query parameters; those of lists may be repeated."""
        given: dict[str, Any] = {}
        for name, value in self.request.query_params.multi_items():
            if name.endswith("_in"):
                given.setdefault(name, []).append(value)
            else:
                given[name] = value
        return _checked(TypeAdapter(model), given)

    async def waiting(self, work: Awaitable[T]) -> T:
        """The end of a wait inside the store, which is given up when the caller hangs up."""
        task, hung_up = asyncio.ensure_future(work), asyncio.ensure_future(self.request.receive())
        try:
            await asyncio.wait([task, hung_up], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refusal(499, "the caller hung up")
            return task.result()
        finally:
            task.cancel()
            hung_up.cancel()

    def name_attempts(self, attempts: Sequence[tuple[str, str]]) -> None:
        """Note attempts, and their rollouts, as named by the request."""
        self.attempts += attempts
        self.rollouts += [rollout_id for rollout_id, _ in attempts]

    def name_spans(self, batch: pa.RecordBatch) -> None:
        """Note the attempts of spans."""
        pairs = zip(batch["rollout_id"].to_pylist(), batch["attempt_id"].to_pylist(), strict=True)
        self.name_attempts(list(dict.fromkeys(pairs)))

    async def knows_all(self) -> bool:
        """Whether the store knows everything that the request names."""
        wanted = set(self.rollouts)
        if wanted:
            found = await self.store.query_rollouts(rollout_id_in=sorted(wanted))
            if len({rollout.rollout_id for rollout in found}) < len(wanted):
                return False
        for rollout_id in {rollout_id for rollout_id, _ in self.attempts}:
            known = {attempt.attempt_id for attempt in await self.store.query_attempts(rollout_id)}
            if not known.issuperset(attempt for rollout, attempt in self.attempts if rollout == rollout_id):
                return False
        return all([await self.store.get_resources_by_id(resources_id) for resources_id in self.resources])


def spans_of_list(data: list[Any]) -> pa.RecordBatch:
    """Spans as JSON has them, as a batch."""
    spans = _checked(_SPANS, data)
    return spans_to_batch(spans)


def _checked(model: TypeAdapter[T], data: Any) -> T:
    """Raises Refusal 422 naming the fields that are missing or wrong."""
    try:
        return model.validate_python(data)
    except ValidationError as error:
        raise Refusal(422, "; ".join(_problem(problem) for problem in error.errors(include_url=False))) from error


def _problem(problem: ErrorDetails) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "the body"
    if problem["type"] == "missing":
        return f"{where}: {problem['msg']}"
    return f"{where} is {repr(problem['input'])[:_SHOWN]}: {problem['msg']}"
