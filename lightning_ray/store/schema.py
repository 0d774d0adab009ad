"""The Arrow schema of spans, and the way from spans to it and back.

One row is one span; a row with ``prompt_ids`` is a model call. Hot columns are typed, everything else of a
span rides in ``more``, a msgpack map. Batches are built where the spans arise; the store appends their IPC
bytes as they are. How rows are made durable and found again is the log's and the core's matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.semconv import REWARD
from lightning_ray.store.packing import pack, unpack
from lightning_ray.types import Span

SCHEMA_VERSION = 1
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
_STATUSES = ("UNSET", "OK", "ERROR")
_COLUMNS = frozenset(SPAN_SCHEMA.names)
_PRIMARY_REWARD = f"{REWARD}.0.value"


def spans_to_batch(spans: Iterable[Mapping[str, Any] | Span]) -> pa.RecordBatch:
    """One record batch of the given spans, in their order.

    A mapping has the keys of the columns and of ``types.Span``; ``status`` is a code or a map with
    ``status_code`` and ``description``. Keys that are no column go to ``more``. ``reward`` defaults to the
    primary reward among the attributes. Token columns may be lists or numpy arrays.
    Raises StoreError naming the span whose values do not fit the schema.
    """
    rows = [_row(span.model_dump() if isinstance(span, Span) else span) for span in spans]
    arrays = [_array(field, [row[field.name] for row in rows], rows) for field in SPAN_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SPAN_SCHEMA)


def read_spans(table: pa.Table | pa.RecordBatch) -> list[Span]:
    """The rows as ``types.Span``, ``more`` unpacked. Token columns stay in the table."""
    spans = []
    columns = [name for name in SPAN_SCHEMA.names if name in Span.model_fields]
    for row in table.select([*columns, "more"]).to_pylist():
        more = unpack(row.pop("more"))
        status = {"status_code": row.pop("status"), "description": more.pop("status_description", None)}
        spans.append(Span.model_validate({**more, **row, "status": status}))
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
    """Spans as an IPC stream of just the table's rows: how answers travel."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode_table(buffer: pa.Buffer) -> pa.Table:
    """The table of ``encode_table``, without a copy."""
    return pa.ipc.open_stream(buffer).read_all()


def _row(span: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: span.get(name) for name in SPAN_SCHEMA.names}
    more = {key: value for key, value in span.items() if key not in _COLUMNS and value is not None}
    status = row["status"] or "UNSET"
    if isinstance(status, Mapping):
        if status.get("description") is not None:
            more["status_description"] = status["description"]
        status = status.get("status_code", "UNSET")
    what = f"span {span.get('name')!r} of rollout {span.get('rollout_id')!r}"
    if status not in _STATUSES:
        raise StoreError(f"{what} has status {status!r}; it must be one of {_STATUSES}")
    row["status"] = status
    if row["reward"] is None:
        row["reward"] = (span.get("attributes") or {}).get(_PRIMARY_REWARD)
    row["more"] = pack(more, what)
    return row


def _array(field: pa.Field, values: list[Any], rows: list[dict[str, Any]]) -> pa.Array:
    if not field.nullable and None in values:
        row = rows[values.index(None)]
        raise StoreError(f"span {row['name']!r} of rollout {row['rollout_id']!r} has no {field.name}; it must have one")
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        ids = sorted({str(row["rollout_id"]) for row in rows})
        raise StoreError(f"spans of rollouts {ids}: column {field.name!r} ({field.type}): {error}") from error
