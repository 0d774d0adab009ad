"""The Arrow schema of spans, and the way from spans to it and back.

One row is one span; a row with ``prompt_ids`` is a model call. Hot columns are typed, everything else of a
span rides in ``more``, a msgpack map, so that ``read_spans(spans_to_batch(spans)) == spans`` but for the token
columns, which stay in the table. Batches are built where the spans arise; the store appends their IPC bytes as
they are. How rows are made durable and found again is the log's and the core's matter.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.semconv import REWARD
from lightning_ray.span import OtelResource, Span, TraceStatus
from lightning_ray.store.packing import pack, unpack

SCHEMA_VERSION = 2
_MAX_BATCH_BYTES = 2**31
_VERSION_KEY = b"lightning_ray.spans"

SPAN_SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("attempt_id", pa.string(), nullable=False),
        pa.field("sequence_id", pa.int32(), nullable=False),
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("span_id", pa.string(), nullable=False),
        pa.field("parent_id", pa.string()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("start_time", pa.float64()),
        pa.field("end_time", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("agent", pa.string()),
        pa.field("model", pa.string()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("sampled_ids", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("weight_versions", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("more", pa.binary(), nullable=False),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
STATUSES = ("UNSET", "OK", "ERROR")
_COLUMNS = frozenset(SPAN_SCHEMA.names) - {"more"}
_TOKENS = frozenset(field.name for field in SPAN_SCHEMA if pa.types.is_list(field.type))
_TOKEN_FIELDS = [field for field in SPAN_SCHEMA if field.name in _TOKENS]
_PLAIN = pa.struct([field for field in SPAN_SCHEMA if field.name not in _TOKENS])
"""All but tokens: what Arrow makes columns of in one go, far cheaper than each by itself."""
_REQUIRED = [(at, field.name) for at, field in enumerate(_PLAIN) if not field.nullable]
_PLACES = [
    (1, _TOKEN_FIELDS.index(field)) if field in _TOKEN_FIELDS else (0, _PLAIN.get_field_index(field.name))
    for field in SPAN_SCHEMA
]
"""Where each column is found: among the plain ones (0) or the tokens (1)."""
_READ = [name for name in SPAN_SCHEMA.names if name not in _TOKENS and name not in ("status", "more")]
_EXTRA = [name for name in _READ if name not in Span.model_fields]
"""Columns that a span has as extra fields, if it has them."""
_OPTIONAL = frozenset(name for name, field in Span.model_fields.items() if not field.is_required()) - _COLUMNS
_PRIMARY_REWARD = f"{REWARD}.0.value"


def spans_to_batch(spans: Iterable[Mapping[str, Any] | Span]) -> pa.RecordBatch:
    """One record batch of the given spans, in their order.

    A mapping has the keys of the columns and of ``Span``; ``status`` is a code or a map with ``status_code``
    and ``description``. Keys that are no column go to ``more``. ``reward`` defaults to the primary reward
    among the attributes. Token columns may be lists or numpy arrays.
    Raises StoreError naming the span whose values do not fit the schema.
    """
    rows = [_row(span) for span in spans]
    tokens = [_array(field, [row.get(field.name) for row in rows], rows) for field in _TOKEN_FIELDS]
    try:
        plain = pa.array(rows, type=_PLAIN).flatten()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError):
        plain = [_array(field, [row.get(field.name) for row in rows], rows) for field in _PLAIN]
    for at, name in _REQUIRED:
        if plain[at].null_count:
            row = rows[plain[at].is_null().index(True).as_py()]
            raise StoreError(f"{_name(row)} has no {name}; it must have one")
    return pa.RecordBatch.from_arrays([(plain, tokens)[kind][at] for kind, at in _PLACES], schema=SPAN_SCHEMA)


def read_spans(table: pa.Table | pa.RecordBatch) -> list[Span]:
    """The rows as ``Span``, ``more`` unpacked; agent, model, finish reason and a reward that is not among the
    attributes are extra fields. Token columns stay in the table.
    """
    if not table.num_rows:
        return []
    columns = [table[name].to_pylist() for name in _READ]
    spans = []
    for values, code, packed in zip(
        zip(*columns, strict=True), table["status"].to_pylist(), table["more"].to_pylist(), strict=True
    ):
        more = unpack(packed)
        fields = dict(zip(_READ, values, strict=True))
        for name in _EXTRA:
            if fields[name] is None or (name == "reward" and fields[name] == _primary_reward(more)):
                del fields[name]
        status = {"status_code": code, **more.pop("status", {})}
        spans.append(Span.model_validate({**more, **fields, "status": status}))
    return spans


def encode_batch(batch: pa.RecordBatch) -> pa.Buffer:
    """The batch as one IPC message without its schema: what travels and what the log holds."""
    if not batch.schema.equals(SPAN_SCHEMA):
        raise StoreError(
            f"spans have the schema {batch.schema.names}, not version {SCHEMA_VERSION} of the store's; "
            "build the batch with spans_to_batch"
        )
    encoded = batch.serialize()
    if encoded.size > _MAX_BATCH_BYTES:
        raise StoreError(f"a batch of {batch.num_rows} spans has {encoded.size} bytes; send fewer at once")
    return encoded


def decode_batch(buffer: pa.Buffer) -> pa.RecordBatch:
    """The batch of ``encode_batch``, without a copy."""
    return pa.ipc.read_record_batch(buffer, SPAN_SCHEMA)


def encode_table(table: pa.Table) -> pa.Buffer:
    """Spans as an IPC stream of just the table's rows: how answers travel. In one piece, unless they are too many: a
    piece for each rollout costs who sends, who reads and who computes far more than the copy.
    """
    if table.nbytes < _MAX_BATCH_BYTES // 2:
        table = table.combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode_table(buffer: pa.Buffer) -> pa.Table:
    """The table of ``encode_table``, without a copy."""
    return pa.ipc.open_stream(buffer).read_all()


def _row(span: Mapping[str, Any] | Span) -> dict[str, Any]:
    if isinstance(span, Span):
        extra = span.__pydantic_extra__
        source: Mapping[str, Any] = {**span.__dict__, **extra} if extra else span.__dict__
    else:
        source = span
    row: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for key, value in source.items():
        if key in _COLUMNS:
            row[key] = value
        elif not (key in _OPTIONAL and _is_default(value)):
            more[key] = value
    row["status"], details = _status(row, row.get("status"))
    if details:
        more["status"] = details
    if row.get("reward") is None:
        row["reward"] = _primary_reward(more)
    row["more"] = pack(more, _name(row))
    return row


def _name(row: Mapping[str, Any]) -> str:
    return f"span {row.get('name')!r} of rollout {row.get('rollout_id')!r}"


def _is_default(value: Any) -> bool:
    if isinstance(value, OtelResource):
        return not (value.attributes or value.schema_url or value.__pydantic_extra__)
    return not value


def _status(row: Mapping[str, Any], status: Any) -> tuple[str, dict[str, Any]]:
    """The code, and what else a status has."""
    details: dict[str, Any] = {}
    if isinstance(status, TraceStatus):
        code: Any = status.status_code
        if status.__pydantic_extra__:
            details.update(status.__pydantic_extra__)
        if status.description is not None:
            details["description"] = status.description
    elif isinstance(status, Mapping):
        details = {key: value for key, value in status.items() if key != "description" or value is not None}
        code = details.pop("status_code", "UNSET")
    else:
        code = status or "UNSET"
    if code not in STATUSES:
        raise StoreError(f"{_name(row)} has status {code!r}; it must be one of {STATUSES}")
    return code, details


def _primary_reward(more: Mapping[str, Any]) -> float | None:
    value = (more.get("attributes") or {}).get(_PRIMARY_REWARD)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _array(field: pa.Field, values: list[Any], rows: list[dict[str, Any]]) -> pa.Array:
    try:
        return _token_array(field.type, values) if field.name in _TOKENS else pa.array(values, type=field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError, struct.error) as error:
        ids = sorted({str(row.get("rollout_id")) for row in rows})
        raise StoreError(f"spans of rollouts {ids}: column {field.name!r} ({field.type}): {error}") from error


def _token_array(kind: pa.ListType, values: Sequence[Any]) -> pa.Array:
    """Lists of numbers as one list array: several times faster than Arrow's own conversion of Python lists."""
    code, dtype = ("f", np.float32) if pa.types.is_floating(kind.value_type) else ("i", np.int32)
    parts = []
    for value in values:
        if isinstance(value, np.ndarray):
            if value.dtype == dtype and value.ndim == 1:
                parts.append(value.tobytes())
                continue
            value = value.tolist()
        parts.append(b"" if value is None else struct.pack(f"{len(value)}{code}", *value))
    offsets = array("i", accumulate((len(part) // 4 for part in parts), initial=0))
    numbers = pa.Array.from_buffers(kind.value_type, offsets[-1], [None, pa.py_buffer(b"".join(parts))])
    there = [value is not None for value in values]
    validity = None if all(there) else pa.array(there, pa.bool_()).buffers()[1]
    return pa.Array.from_buffers(kind, len(parts), [validity, pa.py_buffer(offsets)], children=[numbers])
