"""Attributes: nested to flat and back, tags, links, and what an attribute can hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from pydantic import BaseModel

from lightning_ray import Span
from lightning_ray.otel import (
    check_attributes_sanity,
    extract_links_from_attributes,
    extract_tags_from_attributes,
    filter_and_unflatten_attributes,
    filter_attributes,
    flatten_attributes,
    format_exception_attributes,
    full_qualified_name,
    get_tracer,
    make_link_attributes,
    make_tag_attributes,
    query_linked_spans,
    sanitize_attribute_value,
    sanitize_attributes,
    sanitize_list_attribute_sanity,
    unflatten_attributes,
)
from lightning_ray.semconv import LinkPydanticModel
from lightning_ray.tracing import AttemptTrace, traced


def test_nested_values_become_dotted_keys() -> None:
    nested = {"a": {"b": 1, "c": [2, 3]}, "d": [{"e": "x"}, {"e": "y"}], "f": [1, "x"], "g": (1.0, 2.0)}
    flat = {"a.b": 1, "a.c": [2, 3], "d.0.e": "x", "d.1.e": "y", "f.0": 1, "f.1": "x", "g": [1.0, 2.0]}
    assert flatten_attributes(nested) == flat
    assert flatten_attributes(nested, expand_leaf_lists=True)["a.c.1"] == 3
    assert flatten_attributes([1, 2]) == {"0": 1, "1": 2} and flatten_attributes({"a": {}, "b": []}) == {}
    with pytest.raises(ValueError, match="key 1 under 'a' is int"):
        flatten_attributes({"a": {1: 2}})


def test_dotted_keys_become_nested_values() -> None:
    assert unflatten_attributes({"a.b": 1, "a.c.0": 2, "a.c.1": 3}) == {"a": {"b": 1, "c": [2, 3]}}
    assert unflatten_attributes({"0": "x", "1": "y"}) == ["x", "y"] and unflatten_attributes({}) == {}
    assert unflatten_attributes({"a.0": 1, "a.2": 2}) == {"a": {"0": 1, "2": 2}}
    assert unflatten_attributes({"a.b": 1, "a": 2}) == {"a": {"b": 1}}
    assert unflatten_attributes({"a": {"b.c": 1}}) == {"a": {"b.c": 1}}
    many = {f"a.{index}": index for index in range(12)}
    assert unflatten_attributes(many) == {"a": list(range(12))}


keys = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    st.integers() | st.text("xyz") | st.booleans(),
    lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, min_size=1, max_size=3))
def test_there_and_back(nested: dict[str, Any]) -> None:
    assert unflatten_attributes(flatten_attributes(nested, expand_leaf_lists=True)) == nested
    assert unflatten_attributes(flatten_attributes(nested)) == nested


def test_a_prefix_selects_whole_words() -> None:
    attributes = {"a.b": 1, "ab.c": 2, "a": 3}
    assert filter_attributes(attributes, "a") == {"a.b": 1, "a": 3}
    assert filter_and_unflatten_attributes({"a.b.0": 1, "c": 2}, "a") == {"b": [1]}
    with pytest.raises(ValueError, match="attribute 'a' has a value itself"):
        filter_and_unflatten_attributes(attributes, "a")


def test_tags_and_links_are_found_again() -> None:
    tags = make_tag_attributes(["fast", "gen_ai.model:m"])
    assert tags == {"agentlightning.tag.0": "fast", "agentlightning.tag.1": "gen_ai.model:m"}
    assert extract_tags_from_attributes({**tags, "x": 1}) == ["fast", "gen_ai.model:m"]
    links = make_link_attributes({"gen_ai.response.id": "r-1", "span_id": "s-2"})
    assert links["agentlightning.link.1.key_match"] == "span_id"
    assert extract_links_from_attributes(links) == [
        LinkPydanticModel(key_match="gen_ai.response.id", value_match="r-1"),
        LinkPydanticModel(key_match="span_id", value_match="s-2"),
    ]
    assert extract_tags_from_attributes({}) == [] and extract_links_from_attributes({}) == []
    with pytest.raises(ValueError, match="link 'a' must be a string, got int 1"):
        make_link_attributes({"a": 1})  # type: ignore[dict-item]


def test_a_link_finds_the_spans_that_meet_all_of_it() -> None:
    first = Span.from_attributes(attributes={"gen_ai.response.id": "r-1"}, span_id="s-1", trace_id="t")
    second = Span.from_attributes(attributes={"gen_ai.response.id": "r-1"}, span_id="s-2", trace_id="t")

    def linked(**conditions: str) -> list[Span]:
        return query_linked_spans(
            [first, second], extract_links_from_attributes(make_link_attributes(conditions)) if conditions else []
        )

    assert linked(**{"gen_ai.response.id": "r-1"}) == linked(trace_id="t") == linked() == [first, second]
    assert linked(**{"gen_ai.response.id": "r-1", "span_id": "s-2"}) == [second] and linked(missing="x") == []


def test_a_link_finds_spans_of_opentelemetry() -> None:
    span = TracerProvider(shutdown_on_exit=False).get_tracer("t").start_span("x")
    trace_id, span_id = span.get_span_context().trace_id, span.get_span_context().span_id
    found = [LinkPydanticModel(key_match=k, value_match=v) for k, v in
             (("trace_id", f"{trace_id:032x}"), ("span_id", f"{span_id:016x}"))]  # fmt: skip
    assert query_linked_spans([span], found) == [span]


class Answer(BaseModel):
    text: str


def test_anything_else_becomes_json() -> None:
    assert [sanitize_attribute_value(v) for v in ("a", 1, 1.5, True)] == ["a", 1, 1.5, True]
    assert sanitize_attribute_value(None) == "null" and sanitize_attribute_value({"a": [1]}) == '{"a": [1]}'
    assert sanitize_attribute_value((1, 2.5)) == [1.0, 2.5] and sanitize_attribute_value([True, 2]) == [1, 2]
    assert sanitize_attribute_value(["a", 1]) == '["a", 1]' and sanitize_attribute_value([]) == []
    assert sanitize_attribute_value(np.float32(0.5)) == 0.5 and type(sanitize_attribute_value(np.int64(1))) is int
    assert sanitize_attribute_value(np.array([1, 2])) == "[1, 2]"
    assert sanitize_attribute_value(Answer(text="x")) == '{"text": "x"}'
    assert sanitize_attribute_value(test_anything_else_becomes_json).startswith('"<function')
    with pytest.raises(ValueError, match=r"attribute 'b'.*function"):
        sanitize_attributes({"a": 1, "b": test_anything_else_becomes_json}, force=False)
    with pytest.raises(ValueError, match=r"one kind, got \['int', 'str'\]"):
        sanitize_list_attribute_sanity([1, "a"])


def test_what_an_attribute_cannot_hold_is_named() -> None:
    check_attributes_sanity({"a": 1, "b": ["x"], "c": np.float64(1), "d": math.nan})
    for attributes, message in (
        ({1: 2}, "attribute 1 is int"),
        ({"a": None}, "attribute 'a' is NoneType"),
        ({"a": [1, "x"]}, "attribute 'a': a list holds"),
    ):
        with pytest.raises(ValueError, match=message):
            check_attributes_sanity(attributes)


def test_an_exception_as_attributes() -> None:
    try:
        raise KeyError("x" * 20_000)
    except KeyError as error:
        attributes = format_exception_attributes(error)
    assert attributes["exception.type"] == "KeyError" and attributes["exception.escaped"] is True
    assert len(attributes["exception.stacktrace"]) == 8000
    assert full_qualified_name(int) == "int" and full_qualified_name(Answer).endswith("test_otel.Answer")


def test_the_tracer_records_in_attempts_or_nowhere() -> None:
    with traced(AttemptTrace("r", "a")) as trace:
        get_tracer().start_span("here").end()
        get_tracer(use_active_span_processor=False).start_span("nowhere").end()
    assert [span["name"] for span in trace.spans] == ["here"]
