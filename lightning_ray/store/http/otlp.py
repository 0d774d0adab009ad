"""OTLP/HTTP: what OpenTelemetry exporters post to ``/v1/traces``, as spans of attempts.

Which attempt a span belongs to is said by its attributes ``agentlightning.rollout_id`` and ``.attempt_id``, else by
its resource's, else by the request's headers (OTEL_EXPORTER_OTLP_HEADERS=x-lightning-rollout-id=...), so that an
exporter of any language needs no code for it. Invariant: a span is stored, or counted and explained in the
answer's partial success, or the whole request is refused. Protobuf and JSON, as the protocol has them.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.semconv import LightningResourceAttributes
from lightning_ray.span import convert_timestamp, instrumentation_scope
from lightning_ray.store.base import Store
from lightning_ray.store.http.bodies import Refusal, media_type, read_body
from lightning_ray.store.http.media import JSON, PROTOBUF
from lightning_ray.store.schema import spans_to_batch

ROLLOUT_HEADER = "x-lightning-rollout-id"
ATTEMPT_HEADER = "x-lightning-attempt-id"

ROLLOUT_ID = LightningResourceAttributes.ROLLOUT_ID.value
ATTEMPT_ID = LightningResourceAttributes.ATTEMPT_ID.value
SEQUENCE_ID = LightningResourceAttributes.SPAN_SEQUENCE_ID.value

_STATUS_CODES = {0: "UNSET", 1: "OK", 2: "ERROR"}
_KINDS = {1: "INTERNAL", 2: "SERVER", 3: "CLIENT", 4: "PRODUCER", 5: "CONSUMER"}
_HEX_FIELDS = ("traceId", "spanId", "parentSpanId")
_MAX_INT32 = 2**31 - 1
_log = logging.getLogger(__name__)


async def export_traces(store: Store, request: Request, max_body_bytes: int) -> Response:
    """Store the spans of one export request."""
    kind = media_type(request)
    try:
        if kind not in (PROTOBUF, JSON):
            raise Refusal(415, f"Content-Type {kind!r} is not understood; send {PROTOBUF} or {JSON}")
        export = _parse(await read_body(request, max_body_bytes), kind)
        rows = list(spans_of(export, request.headers))
        return _answer(await _store(store, rows), kind)
    except Refusal as refusal:
        return _refuse(refusal, kind)
    except InfrastructureError as error:
        return _refuse(Refusal(503, str(error), {"Retry-After": "1"}), kind)
    except Exception:
        _log.exception("an export of traces failed")
        return _refuse(Refusal(500, "the store's HTTP API failed; its log says why"), kind)


def spans_of(export: ExportTraceServiceRequest, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The spans as rows for ``spans_to_batch``; their ids are None where nothing tells them, 0 for the number."""
    for resource_spans in export.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        ids = {ROLLOUT_ID: headers.get(ROLLOUT_HEADER), ATTEMPT_ID: headers.get(ATTEMPT_HEADER), **resource}
        for scope_spans in resource_spans.scope_spans:
            scope = scope_spans.scope
            extra = {"instrumentation_scope": instrumentation_scope(scope.name, scope.version)} if scope.name else {}
            for span in scope_spans.spans:
                attributes = _attributes(span.attributes)
                yield {
                    **_ids({**ids, **attributes}),
                    **_fields(span),
                    **extra,
                    "attributes": attributes,
                    "resource": {"attributes": resource, "schema_url": resource_spans.schema_url},
                }


def _fields(span: Any) -> dict[str, Any]:
    trace_id, span_id = span.trace_id.hex().zfill(32), span.span_id.hex().zfill(16)
    fields = {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": span.parent_span_id.hex().zfill(16) if span.parent_span_id else None,
        "name": span.name,
        "status": {
            "status_code": _STATUS_CODES.get(span.status.code, "UNSET"),
            "description": span.status.message or None,
        },
        "start_time": convert_timestamp(span.start_time_unix_nano),
        "end_time": convert_timestamp(span.end_time_unix_nano),
        "context": _context(trace_id, span_id, span.trace_state),
        "events": [
            {
                "name": event.name,
                "attributes": _attributes(event.attributes),
                "timestamp": convert_timestamp(event.time_unix_nano),
            }
            for event in span.events
        ],
        "links": [
            {
                "context": _context(link.trace_id.hex().zfill(32), link.span_id.hex().zfill(16), link.trace_state),
                "attributes": _attributes(link.attributes) or None,
            }
            for link in span.links
        ],
    }
    if span.kind in _KINDS:
        fields["kind"] = _KINDS[span.kind]
    return fields


def _ids(said: Mapping[str, Any]) -> dict[str, Any]:
    rollout_id, attempt_id = said[ROLLOUT_ID], said[ATTEMPT_ID]
    try:
        number = int(str(said.get(SEQUENCE_ID, 0)))
    except ValueError:
        number = 0
    return {
        "rollout_id": None if rollout_id is None else str(rollout_id),
        "attempt_id": None if attempt_id is None else str(attempt_id),
        "sequence_id": number if 0 <= number <= _MAX_INT32 else 0,
    }


def _context(trace_id: str, span_id: str, state: str) -> dict[str, Any]:
    members = (member.strip().partition("=") for member in state.split(",") if member.strip())
    return {
        "trace_id": trace_id,
        "span_id": span_id,
        "is_remote": False,
        "trace_state": {key: value for key, _, value in members},
    }


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    """Plain data; bytes as hex, so that JSON can hold them."""
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return getattr(value, kind)


async def _store(store: Store, rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Store what can be stored; returns how many spans could not be, with the reasons."""
    named = [row for row in rows if row["rollout_id"] and row["attempt_id"]]
    refused = []
    if len(named) < len(rows):
        reason = (
            f"the spans do not say which attempt they are of: set the resource attributes {ROLLOUT_ID} and "
            f"{ATTEMPT_ID}, or the headers {ROLLOUT_HEADER} and {ATTEMPT_HEADER}"
        )
        refused.append((len(rows) - len(named), reason))
    if named:
        try:
            await store.append_spans(spans_to_batch(named))
        except StoreError as error:
            unknown = await _unknown(store, {(row["rollout_id"], row["attempt_id"]) for row in named})
            if not unknown:
                raise Refusal(400, str(error)) from error
            count = sum((row["rollout_id"], row["attempt_id"]) in unknown for row in named)
            refused.append((count, str(error)))
    return refused


async def _unknown(store: Store, attempts: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that the store does not know; it has stored the spans of the others."""
    known: set[tuple[str, str]] = set()
    found = await store.query_rollouts(rollout_id_in=sorted({rollout_id for rollout_id, _ in attempts}))
    for rollout in found:
        for attempt in await store.query_attempts(rollout.rollout_id):
            known.add((rollout.rollout_id, attempt.attempt_id))
    return attempts - known


def _parse(body: bytes, kind: str) -> ExportTraceServiceRequest:
    export = ExportTraceServiceRequest()
    try:
        if kind == PROTOBUF:
            export.ParseFromString(body)
        else:
            json_format.ParseDict(_with_base64_ids(from_json(body)), export, ignore_unknown_fields=True)
    except (DecodeError, json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(400, f"the body is no OTLP export of traces: {error}") from error
    return export


def _with_base64_ids(export: Any) -> Any:
    """OTLP's JSON has ids in hex where protobuf's has base64."""
    for resource_spans in export.get("resourceSpans", ()):
        for scope_spans in resource_spans.get("scopeSpans", ()):
            for span in scope_spans.get("spans", ()):
                for part in (span, *span.get("links", ())):
                    for name in _HEX_FIELDS:
                        if name in part:
                            part[name] = base64.b64encode(bytes.fromhex(part[name])).decode()
    return export


def _answer(refused: list[tuple[int, str]], kind: str) -> Response:
    export = ExportTraceServiceResponse()
    if refused:
        export.partial_success.rejected_spans = sum(count for count, _ in refused)
        export.partial_success.error_message = "; ".join(
            f"{count} spans refused: {reason}" for count, reason in refused
        )
    if kind == PROTOBUF:
        return Response(export.SerializeToString(), media_type=PROTOBUF)
    return Response(json_format.MessageToJson(export), media_type=JSON)


def _refuse(refusal: Refusal, kind: str) -> Response:
    """A google.rpc.Status, of which only the message (field 2, a string) is set."""
    if kind != PROTOBUF:
        content = to_json({"message": refusal.detail})
        return Response(content, refusal.status, refusal.headers, media_type=JSON)
    message = refusal.detail.encode()
    length, size = b"", len(message)
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return Response(b"\x12" + length + bytes([size]) + message, refusal.status, refusal.headers, media_type=PROTOBUF)
