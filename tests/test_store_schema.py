"""Spans to Arrow and back: nothing lost, nothing bent, misfits refused by name."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.errors import StoreError
from lightning_ray.span import Event, Link, OtelResource, SpanContext
from lightning_ray.store.foreign import conform
from lightning_ray.store.packing import unpack
from lightning_ray.store.schema import (
    SPAN_SCHEMA,
    decode_batch,
    decode_table,
    encode_batch,
    encode_table,
    read_spans,
    spans_to_batch,
)
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


TEXT = st.text(max_size=8)
TIME = st.none() | st.floats(0, 4e9)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ATTRIBUTES = st.dictionaries(TEXT | st.just("agentlightning.reward.0.value"), VALUE, max_size=4)
EXTRA = st.dictionaries(st.sampled_from(["kind", "more", "status_description", "x", "ünï"]), VALUE, max_size=3)


@st.composite
def contexts(draw: st.DrawFn) -> SpanContext:
    state = draw(st.dictionaries(TEXT, TEXT, max_size=2))
    return SpanContext(
        trace_id=draw(TEXT), span_id=draw(TEXT), is_remote=draw(st.booleans()), trace_state=state, **draw(EXTRA)
    )


@st.composite
def spans(draw: st.DrawFn) -> Span:
    columns = {
        "agent": draw(st.none() | TEXT),
        "model": draw(st.none() | TEXT),
        "finish_reason": draw(st.none() | TEXT),
    }
    return Span(
        rollout_id=draw(TEXT),
        attempt_id=draw(TEXT),
        sequence_id=draw(st.integers(0, 2**31 - 1)),
        trace_id=draw(TEXT),
        span_id=draw(TEXT),
        parent_id=draw(st.none() | TEXT),
        name=draw(TEXT),
        status=SpanStatus(
            status_code=draw(st.sampled_from(["UNSET", "OK", "ERROR"])),
            description=draw(st.none() | TEXT),
            **draw(EXTRA),
        ),
        attributes=draw(ATTRIBUTES),
        events=draw(st.lists(st.builds(Event, name=TEXT, attributes=ATTRIBUTES, timestamp=TIME, x=VALUE), max_size=2)),
        links=draw(st.lists(st.builds(Link, context=contexts(), attributes=st.none() | ATTRIBUTES), max_size=2)),
        start_time=draw(TIME),
        end_time=draw(TIME),
        context=draw(st.none() | contexts()),
        parent=draw(st.none() | contexts()),
        resource=draw(st.builds(OtelResource, attributes=ATTRIBUTES, schema_url=TEXT)),
        **draw(EXTRA),
        **{name: value for name, value in columns.items() if value is not None},
    )


@settings(max_examples=300)
@given(st.lists(spans(), max_size=4))
def test_spans_survive_the_round_trip(originals: list[Span]) -> None:
    batch = decode_batch(encode_batch(spans_to_batch(originals)))
    assert read_spans(batch) == originals
    assert read_spans(conform(pa.Table.from_batches([batch]))) == originals


@settings(max_examples=100)
@given(
    st.lists(st.none() | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4), min_size=1, max_size=4),
    st.booleans(),
)
def test_tokens_are_kept_as_lists_or_arrays(prompts: list[list[int] | None], as_arrays: bool) -> None:
    given = [np.array(ids, np.int32) if as_arrays and ids is not None else ids for ids in prompts]
    batch = spans_to_batch([span(prompt_ids=ids) for ids in given])
    batch.validate(full=True)
    assert batch["prompt_ids"].to_pylist() == prompts


def test_a_reward_of_its_own_is_an_extra_field() -> None:
    own = Span(**span(reward=0.5), attributes={"agentlightning.reward.0.value": 0.25})
    assert read_spans(spans_to_batch([own])) == [own]
    emitted = Span(**span(), attributes={"agentlightning.reward.0.value": 0.25})
    batch = spans_to_batch([emitted])
    assert batch["reward"].to_pylist() == [0.25]
    assert read_spans(batch) == [emitted]


@pytest.mark.parametrize("value", ["high", None, True, [1.0]])
def test_a_reward_that_is_no_number_is_an_attribute_only(value: Any) -> None:
    batch = spans_to_batch([span(attributes={"agentlightning.reward.0.value": value})])
    assert batch["reward"].to_pylist() == [None]


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
        ({"prompt_ids": [1.5]}, "prompt_ids"),
        ({"prompt_ids": [None]}, "prompt_ids"),
        ({"prompt_ids": 7}, "prompt_ids"),
        ({"prompt_ids": np.array([[1, 2]])}, "prompt_ids"),
        ({"logprobs": ["x"]}, "logprobs"),
        ({"start_time": "noon"}, "start_time"),
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


def test_many_pieces_travel_as_one() -> None:
    batches = [spans_to_batch([span(span_id=str(i), prompt_ids=range(i))]) for i in range(50)]
    whole = pa.Table.from_batches(batches)
    arrived = decode_table(encode_table(whole))
    assert arrived.equals(whole) and arrived["span_id"].num_chunks == 1


def table(**columns: list[Any]) -> pa.Table:
    ids = {"rollout_id": ["r"], "attempt_id": ["a"], "trace_id": ["t"], "span_id": ["s"], "name": ["n"]}
    return pa.table({**ids, "sequence_id": [1], "status": ["OK"], "more": [b"\x80"], **columns})


def test_a_table_of_others_is_made_to_conform() -> None:
    batch = conform(table(prompt_ids=[[1, 2]], reward=[1]))
    assert batch.schema == SPAN_SCHEMA
    assert read_spans(batch)[0].reward == 1.0


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (table(colour=["red"]), "colour"),
        (table(rollout_id=[None]), "rollout_id"),
        (table(prompt_ids=[["x"]]), "prompt_ids"),
        (table(sequence_id=[2**40]), "sequence_id"),
        (table(status=["fine"]), "status"),
        (table(more=[b"\xc1"]), "more"),
        (table(more=[b"\x01"]), "more"),
        (table(more=[msgpack.packb({"x": msgpack.ExtType(65, b"")})]), "more"),
        (table(more=[msgpack.packb({"attributes": 5})]), "attributes"),
        (table(more=[msgpack.packb({"links": [{}]})]), "links.0.context"),
        (table(more=[msgpack.packb({"status": 1})]), "status"),
        (table().drop_columns(["span_id"]), "span_id"),
    ],
)
def test_a_table_that_does_not_conform_is_refused_by_column(made: pa.Table, named: str) -> None:
    with pytest.raises(StoreError, match=named):
        conform(made)
