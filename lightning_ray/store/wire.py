"""How calls and answers of the store travel between processes: msgpack, with Arrow data beside it.

What arrives is what was sent, as plain data: the types of ``lightning_ray.types`` as themselves, tuples as
lists, numbers of numpy as Python's. Arrow buffers and tables are handed over as buffers, not copied. Nothing
is pickled. How often a call is sent, and over what, is left to the clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
import pyarrow as pa
from pydantic import BaseModel

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.schema import decode_table, encode_table
from lightning_ray.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    PaginatedResult,
    PromptTemplate,
    ProxyLLM,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    Worker,
)

_MODELS: dict[int, type[BaseModel]] = dict(
    enumerate(
        (
            Attempt,
            AttemptedRollout,
            EnqueueRolloutRequest,
            LLM,
            PaginatedResult,
            PromptTemplate,
            ProxyLLM,
            ResourcesUpdate,
            Rollout,
            RolloutConfig,
            Worker,
        )
    )
)
_CODES = {model: code for code, model in _MODELS.items()}
_BUFFER, _TABLE = 64, 65
_ERRORS: dict[str, type[Exception]] = {"StoreError": StoreError, "InfrastructureError": InfrastructureError}
_INLINE_BYTES = 16_384
"""Buffers up to this size are copied into the message: cheaper than handing them over apart."""


def encode(value: Any, what: str) -> tuple[bytes, list[pa.Buffer]]:
    """A message and the buffers beside it. Raises StoreError naming ``what`` for what cannot be sent."""
    encoder = _Encoder()
    try:
        return encoder.message(value), encoder.buffers
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{_where(value, what)} cannot be stored: {_reason(error)}") from None


def decode(message: bytes, buffers: list[pa.Buffer]) -> Any:
    """The value that ``encode`` was given."""
    return _Decoder(buffers).value(message)


def outcome_of(error: Exception) -> tuple[str, str]:
    """What travels of a failed call: refusals and a failing disk by name, defects of the store as their text."""
    for name, kind in _ERRORS.items():
        if isinstance(error, kind):
            return name, str(error)
    return "RuntimeError", f"{type(error).__name__}: {error}"


def raise_outcome(outcome: list[str]) -> None:
    """Raise what ``outcome_of`` was given."""
    name, text = outcome
    raise _ERRORS.get(name, RuntimeError)(text)


class _Encoder:
    """Objects rather than closures: closures that call each other would hold the buffers until the collector runs."""

    def __init__(self) -> None:
        self.buffers: list[pa.Buffer] = []

    def message(self, value: Any) -> bytes:
        return msgpack.packb(value, default=self._extension)

    def _extension(self, item: Any) -> Any:
        if isinstance(item, pa.Table):
            return msgpack.ExtType(_TABLE, self.message(encode_table(item)))
        if isinstance(item, pa.Buffer):
            if item.size <= _INLINE_BYTES:
                return msgpack.ExtType(_BUFFER, msgpack.packb(item.to_pybytes()))
            self.buffers.append(item)
            return msgpack.ExtType(_BUFFER, msgpack.packb(len(self.buffers) - 1))
        code = _code(type(item))
        if code is None:
            return unpack(pack(item, "it"))
        return msgpack.ExtType(code, self.message(item.__dict__))


class _Decoder:
    def __init__(self, buffers: list[pa.Buffer]) -> None:
        self._buffers = buffers

    def value(self, message: bytes) -> Any:
        return msgpack.unpackb(message, ext_hook=self._extended, strict_map_key=False)

    def _extended(self, code: int, data: bytes) -> Any:
        value = self.value(data)
        if code == _BUFFER:
            return self._buffers[value] if isinstance(value, int) else pa.py_buffer(value)
        if code == _TABLE:
            return decode_table(value)
        return _MODELS[code].model_validate(value)


def _code(kind: type) -> int | None:
    for base in kind.__mro__:
        if base in _CODES:
            return _CODES[base]
    return None


def _where(value: Any, what: str) -> str:
    """Where in a value that cannot be sent the culprit is: the ids and names on the way to it."""
    if isinstance(value, BaseModel):
        value = value.__dict__
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        try:
            encode(item, "")
        except StoreError:
            at = value.get("rollout_id") if isinstance(value, Mapping) else value[0]
            name = [str(at)] if isinstance(at, str) else []
            return _where(item, ", ".join([what, *name, *([] if isinstance(key, int) else [str(key)])]))
    return what


def _reason(error: Exception) -> str:
    return str(error).removeprefix("it cannot be stored: ")
