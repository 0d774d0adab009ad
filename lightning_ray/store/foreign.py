"""Tables of spans that others made, checked and brought into the store's schema.

Invariant: what ``conform`` returns is as good as what ``spans_to_batch`` makes: valid, and readable by
``read_spans``. Encodings that could grow are refused, so that a small table stays small.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from lightning_ray.errors import StoreError
from lightning_ray.store.packing import unpack_foreign
from lightning_ray.store.schema import SPAN_SCHEMA, STATUSES, read_spans

_FIELDS = tuple(SPAN_SCHEMA)


def conform(table: pa.Table) -> pa.RecordBatch:
    """A batch of SPAN_SCHEMA from a table that others made: columns by name, nullable ones may be missing.

    Checks all that the store relies on and raises StoreError naming the column.
    """
    try:
        table.validate(full=True)
        table = table.combine_chunks()
        unknown = sorted(set(table.schema.names) - set(SPAN_SCHEMA.names))
        if unknown:
            raise StoreError(f"spans have no columns {unknown}; they have {SPAN_SCHEMA.names}")
        for field in _FIELDS:
            _check_type(table.schema, field)
        arrays = [_conform_column(table, field) for field in _FIELDS]
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
        raise StoreError(f"the table of spans is damaged: {error}") from error
    batch = pa.RecordBatch.from_arrays(arrays, schema=SPAN_SCHEMA)
    try:
        read_spans(batch)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise StoreError(f"column 'more' has a span that cannot be read: {where}: {problem['msg']}") from error
    except (TypeError, AttributeError) as error:
        raise StoreError(f"column 'more' has a span whose status or attributes are no map: {error}") from error
    return batch


def _check_type(schema: pa.Schema, field: pa.Field) -> None:
    """Refuse what is missing, and encodings that grow when they are cast (dictionaries, runs, views)."""
    if field.name not in schema.names:
        if not field.nullable:
            raise StoreError(f"the table of spans has no column {field.name!r} ({field.type}); it must have one")
        return
    given = schema.field(field.name).type
    types = pa.types
    if types.is_list(given) or types.is_large_list(given) or types.is_fixed_size_list(given):
        given = given.value_type
    simple = (types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_binary)
    if not (
        any(is_one(given) for is_one in (*simple, types.is_large_binary)) or (types.is_null(given) and field.nullable)
    ):
        raise StoreError(f"column {field.name!r} must be {field.type}, not {given}")


def _conform_column(table: pa.Table, field: pa.Field) -> pa.Array:
    if field.name not in table.schema.names:
        return pa.nulls(table.num_rows, field.type)
    try:
        column = table.column(field.name).cast(field.type).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise StoreError(f"column {field.name!r} must be {field.type}: {error}") from error
    if column.null_count and not field.nullable:
        raise StoreError(f"column {field.name!r} of the spans has {column.null_count} nulls; it must have none")
    if field.name == "status" and not pc.all(pc.is_in(column, pa.array(STATUSES)), min_count=0).as_py():
        raise StoreError(f"column 'status' has other values than {STATUSES}")
    if field.name == "more" and not all(_is_map(value) for value in column):
        raise StoreError("column 'more' must hold msgpack maps")
    return column


def _is_map(value: pa.BinaryScalar) -> bool:
    try:
        return isinstance(unpack_foreign(value.as_buffer()), dict)
    except ValueError:
        return False
