"""Attributes of spans: nested values to flat ones and back, tags, links, exceptions, and what OpenTelemetry can hold.

Names and meaning as in Agent Lightning 0.3's ``utils.otel``.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, TypeAdapter

from lightning_ray.semconv import LightningSpanAttributes, LinkAttributes, LinkPydanticModel
from lightning_ray.span import Attributes, span_id_hex, trace_id_hex

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

MAX_STACK_CHARACTERS = 8000
"""Of a stack trace the end is kept: it says where the exception was raised."""

S = TypeVar("S")


def full_qualified_name(obj: type) -> str:
    """``module.Class``; builtins go without a module."""
    return obj.__qualname__ if obj.__module__ == "builtins" else f"{obj.__module__}.{obj.__qualname__}"


def get_tracer_provider(inspect: bool = True) -> TracerProvider:
    """The provider whose spans always reach the attempt they begin in. ``inspect`` is accepted and changes nothing."""
    from lightning_ray.tracing import provider

    provider.install()
    return provider.OWN


def get_tracer(use_active_span_processor: bool = True) -> Tracer:
    """A tracer of that provider; with ``use_active_span_processor=False`` one that records nothing."""
    from opentelemetry.trace import NoOpTracer

    return get_tracer_provider().get_tracer("agentlightning") if use_active_span_processor else NoOpTracer()


def make_tag_attributes(tags: Sequence[str]) -> dict[str, Any]:
    """Attributes that tag a span: ``["fast"]`` -> ``{"agentlightning.tag.0": "fast"}``."""
    return flatten_attributes({LightningSpanAttributes.TAG.value: list(tags)}, expand_leaf_lists=True)


def extract_tags_from_attributes(attributes: Mapping[str, Any]) -> list[str]:
    """The tags of a span; none if it has none."""
    found = filter_and_unflatten_attributes(attributes, LightningSpanAttributes.TAG.value)
    return TypeAdapter(list[str]).validate_python(found or [])


def make_link_attributes(links: Mapping[str, str]) -> dict[str, Any]:
    """Attributes that link a span to those with these values, ``{"gen_ai.response.id": "r-1"}`` for example.

    Raises ValueError for a value that is no string.
    """
    conditions = []
    for key, value in links.items():
        if not isinstance(value, str):
            raise ValueError(f"link {key!r} must be a string, got {type(value).__name__} {value!r}")
        conditions.append({LinkAttributes.KEY_MATCH.value: key, LinkAttributes.VALUE_MATCH.value: value})
    return flatten_attributes({LightningSpanAttributes.LINK.value: conditions}, expand_leaf_lists=True)


def extract_links_from_attributes(attributes: Mapping[str, Any]) -> list[LinkPydanticModel]:
    """The links of a span; none if it has none."""
    found = filter_and_unflatten_attributes(attributes, LightningSpanAttributes.LINK.value)
    return TypeAdapter(list[LinkPydanticModel]).validate_python(found or [])


def query_linked_spans(spans: Iterable[S], links: Sequence[LinkPydanticModel]) -> list[S]:
    """The spans that meet every condition; no conditions, every span."""
    return [span for span in spans if all(_linked(span, link.key_match) == link.value_match for link in links)]


def _linked(span: Any, key: str) -> Any:
    if key not in ("trace_id", "span_id"):
        return (span.attributes or {}).get(key)
    if isinstance(own := getattr(span, key, None), str):
        return own
    context = span.get_span_context()
    if context is None:
        return None
    return trace_id_hex(context.trace_id) if key == "trace_id" else span_id_hex(context.span_id)


def filter_attributes(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Those whose key is ``prefix`` or begins with ``prefix.``."""
    return {key: value for key, value in attributes.items() if key == prefix or key.startswith(f"{prefix}.")}


def filter_and_unflatten_attributes(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any] | list[Any]:
    """What is nested under ``prefix``. Raises ValueError if ``prefix`` itself is a key."""
    found = filter_attributes(attributes, prefix)
    if prefix in found:
        raise ValueError(f"attribute {prefix!r} has a value itself, {found[prefix]!r:.80}: nothing is nested under it")
    return unflatten_attributes({key[len(prefix) + 1 :]: value for key, value in found.items()})


def flatten_attributes(
    nested_data: Mapping[str, Any] | Sequence[Any], *, expand_leaf_lists: bool = False
) -> dict[str, Any]:
    """``{"a": {"b": 1, "c": [2, 3]}}`` -> ``{"a.b": 1, "a.c": [2, 3]}``, or ``a.c.0`` and ``a.c.1`` on request.

    A list of one kind of strings, booleans, integers or floats is a leaf; any other is indexed. Empty maps and lists
    leave nothing. Raises ValueError for a key that is no string.
    """
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"key {key!r} under {path!r} is {type(key).__name__}; keys must be strings")
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, (list, tuple)):
            if path and not expand_leaf_lists and _is_leaf(value):
                flat[path] = list(value)
                return
            for index, item in enumerate(value):
                walk(item, f"{path}.{index}" if path else str(index))
        else:
            flat[path] = value

    walk(nested_data, "")
    return flat


def _is_leaf(values: Sequence[Any]) -> bool:
    kinds = {type(value) for value in values}
    return len(kinds) == 1 and kinds <= {str, bool, int, float}


def unflatten_attributes(flat_data: Mapping[str, Any]) -> dict[str, Any] | list[Any]:
    """The inverse of ``flatten_attributes``: keys 0, 1, ... n - 1 become a list.

    Where a key is both a value and a prefix of others, what is nested wins.
    """
    root: dict[str, Any] = {}
    for path, value in sorted(flat_data.items(), key=lambda item: item[0].count(".")):
        *heads, last = path.split(".")
        node = root
        for head in heads:
            inner = node.get(head)
            if not isinstance(inner, _Node):
                inner = node[head] = _Node()
            node = inner
        node[last] = value
    return _listed(root)


class _Node(dict[str, Any]):
    """A level of nesting, as opposed to a value that is a map."""


def _listed(node: dict[str, Any]) -> dict[str, Any] | list[Any]:
    plain = {key: _listed(value) if isinstance(value, _Node) else value for key, value in node.items()}
    indices = [str(index) for index in range(len(plain))]
    if plain and set(plain) == set(indices):
        return [plain[index] for index in indices]
    return plain


def sanitize_attribute_value(object: Any, force: bool = True) -> Any:
    """A value that an attribute can hold: primitives and lists of one kind as they are, anything else as JSON.

    Numpy scalars are numbers. Without ``force``, raises ValueError for what JSON cannot express.
    """
    if isinstance(object, (str, bool, int, float)):
        return object
    if isinstance(object, (list, tuple)):
        try:
            return sanitize_list_attribute_sanity(list(object))
        except ValueError:
            pass
    elif (item := _scalar(object)) is not None:
        return item
    try:
        return json.dumps(object, default=_jsonable if force else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{type(object).__name__} {object!r:.80} cannot be expressed as JSON: {error}") from error


def _scalar(value: Any) -> bool | int | float | str | None:
    """A numpy scalar, or an array of one number, as Python's own."""
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return None
    item = value.item()
    return item if isinstance(item, (str, bool, int, float)) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if (item := _scalar(value)) is not None:
        return item
    return value.tolist() if hasattr(value, "tolist") else str(value)


def sanitize_attributes(attributes: Mapping[str, Any], force: bool = True) -> Attributes:
    """The attributes with values that can be held; see ``sanitize_attribute_value``."""
    try:
        return {(last := key): sanitize_attribute_value(value, force) for key, value in attributes.items()}
    except ValueError as error:
        raise ValueError(f"attribute {last!r}: {error}") from error


def sanitize_list_attribute_sanity(maybe_list: Sequence[Any]) -> list[Any]:
    """The list, if it is of one kind; mixed numbers become the widest kind. Raises ValueError otherwise."""
    values = [value if (item := _scalar(value)) is None else item for value in maybe_list]
    kinds = {type(value) for value in values}
    if len(kinds) <= 1 and kinds <= {str, bool, int, float}:
        return values
    if kinds <= {int, float, bool}:
        widest = float if float in kinds else int
        return [widest(value) for value in values]
    raise ValueError(f"a list holds strings, booleans or numbers of one kind, got {sorted(k.__name__ for k in kinds)}")


def check_attributes_sanity(attributes: Mapping[Any, Any]) -> None:
    """Raises ValueError naming the first attribute that cannot be held as it is."""
    for key, value in attributes.items():
        if not isinstance(key, str):
            raise ValueError(f"attribute {key!r} is {type(key).__name__}; keys must be strings")
        if isinstance(value, (list, tuple)):
            try:
                sanitize_list_attribute_sanity(value)
            except ValueError as error:
                raise ValueError(f"attribute {key!r}: {error}") from error
        elif not isinstance(value, (str, int, float, bool)) and _scalar(value) is None:
            raise ValueError(
                f"attribute {key!r} is {type(value).__name__} {value!r:.80}; "
                "it must be a string, a number, a boolean or a list of these"
            )


def format_exception_attributes(exception: BaseException) -> Attributes:
    """OpenTelemetry's attributes of an exception: type, message and stack trace."""
    attributes: Attributes = {
        "exception.type": type(exception).__name__,
        "exception.message": str(exception),
        "exception.escaped": True,
    }
    if stack := "".join(traceback.format_exception(exception)).strip():
        attributes["exception.stacktrace"] = stack[-MAX_STACK_CHARACTERS:]
    return attributes
