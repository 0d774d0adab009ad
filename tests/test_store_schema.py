"""Spans to Arrow and back: nothing lost, nothing bent, misfits refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lightning_ray.errors import StoreError
from lightning_ray.store import SPAN_SCHEMA, read_spans, spans_to_batch
from lightning_ray.store.packing import unpack
from lightning_ray.store.schema import decode_batch, decode_table, encode_batch, encode_table
from lightning_ray.types import Span, SpanStatus


def span(**fields: Any) -> dict[str, Any]:
    ids = {"rollout_id": "ro-1", "attempt_id": "at-1", "sequence_id": 1, "trace_id": "t", "span_id": "s"}
    return {**ids, "name": "openai.chat.completion", **fields}


def test_model_call_keeps_its_tokens_exactly() -> None:
    logprobs = np.array([-0.1, -2.5e-8], np.float32)
    call = span(
        prompt_ids=[1, 2, 3],
        sampled_ids=np.array([7, 8], np.int32),
        logprobs=logprobs,
        weight_versions=[4, 4],
    )
    row = decode_batch(encode_batch(spans_to_batch([call]))).to_pylist()[0]
    assert (row["prompt_ids"], row["sampled_ids"], row["weight_versions"]) == ([1, 2, 3], [7, 8], [4, 4])
    assert np.array_equal(np.array(row["logprobs"], np.float32), logprobs)


def test_span_survives_the_round_trip() -> None:
    original = Span(
        **span(parent_id="p", start_time=1.5, end_time=2.5),
        status=SpanStatus(status_code="ERROR", description="no answer"),
        attributes={"a": 1, "nested": {"b": [1.5, "x", None]}, "raw": b"\x00"},
        events=[{"name": "e", "timestamp": 1.6, "attributes": {}}],
        links=[{"trace_id": "o"}],
    )
    assert read_spans(spans_to_batch([original])) == [original]


def test_unknown_keys_ride_in_more() -> None:
    row = spans_to_batch([span(messages=[{"role": "user"}], wire="chat")]).to_pylist()[0]
    assert unpack(row["more"]) == {"messages": [{"role": "user"}], "wire": "chat"}


def test_primary_reward_comes_from_the_attributes() -> None:
    attributes = {"agentlightning.reward.0.value": 0.25, "agentlightning.reward.1.value": 9.0}
    rewards = spans_to_batch([span(attributes=attributes), span(reward=1.0), span()])["reward"].to_pylist()
    assert rewards == [0.25, 1.0, None]


def test_numpy_and_tuples_become_plain() -> None:
    values = {"scalar": np.float32(0.5), "array": np.arange(3), "tuple": (1, 2)}
    assert read_spans(spans_to_batch([span(attributes=values)]))[0].attributes == {
        "scalar": 0.5,
        "array": [0, 1, 2],
        "tuple": [1, 2],
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attempt_id": None}, "attempt_id"),
        ({"prompt_ids": ["x"]}, "prompt_ids"),
        ({"prompt_ids": [2**40]}, "prompt_ids"),
        ({"attributes": {"o": object()}}, "object"),
        ({"status": "ok"}, "'ok'"),
    ],
)
def test_misfits_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(StoreError, match=named) as refusal:
        spans_to_batch([span(**fields)])
    assert "ro-1" in str(refusal.value)


def test_a_foreign_schema_is_refused() -> None:
    with pytest.raises(StoreError, match="spans_to_batch"):
        encode_batch(pa.RecordBatch.from_pydict({"x": [1]}))


def test_no_spans_make_an_empty_batch() -> None:
    assert spans_to_batch([]).schema == SPAN_SCHEMA
    assert spans_to_batch([]).num_rows == 0


def test_a_slice_travels_alone() -> None:
    table = pa.Table.from_batches([spans_to_batch([span(span_id=str(i), prompt_ids=range(1000)) for i in range(50)])])
    encoded = encode_table(table.slice(3, 1))
    assert encoded.size < 10_000
    assert decode_table(encoded).equals(table.slice(3, 1))
