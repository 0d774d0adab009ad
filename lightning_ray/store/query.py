"""Filtering, sorting and paging of the store's objects, in Agent Lightning's terms.

A filter is named after its field: ``field`` equals, ``field_in`` is one of, ``field_contains`` has as a
substring; ``filter_logic`` joins them. Only the chosen page is ever copied, by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from heapq import nlargest, nsmallest
from itertools import count, islice
from operator import attrgetter
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel

from lightning_ray.errors import StoreError
from lightning_ray.types import PaginatedResult, SortOrder

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Test = Callable[[Any], bool]


class Page(NamedTuple):
    """Which part of an answer is wanted, in which order; ``limit`` -1 is all."""

    sort_by: str | None = None
    sort_order: SortOrder = "asc"
    limit: int = -1
    offset: int = 0


def select(items: Collection[M], model: type[M], where: Mapping[str, Any], page: Page) -> PaginatedResult[M]:
    """The page of the items that pass the filters. Raises StoreError for fields that ``model`` does not have."""
    chosen, total = choose(items, model, where, page)
    return result(chosen, total, page)


def choose(
    items: Collection[T],
    model: type[BaseModel],
    where: Mapping[str, Any],
    page: Page,
    path: str = "",
    total: int | None = None,
) -> tuple[list[T], int]:
    """As ``select``, for items that have the object in their attribute ``path`` (such as ``"rollout."``);
    returns the page's items and how many passed. Items whose sorting field is None come last.

    With ``total``, how many will pass, no more items are looked at than an unsorted page needs.
    """
    _check(page)
    tests = [
        _test(model, key, value, path) for key, value in where.items() if key != "filter_logic" and value is not None
    ]
    logic = where.get("filter_logic", "and")
    if logic not in ("and", "or"):
        raise StoreError(f"filter_logic is {logic!r}; it must be 'and' or 'or'")
    if page.sort_by is not None:
        _comparable(model, page.sort_by, "sort_by")
    if not tests and page.sort_by is None:
        return list(islice(items, page.offset, _end(page))), len(items)
    join = all if logic == "and" else any
    passing = (item for item in items if not tests or join(test(item) for test in tests))
    if total is not None and page.sort_by is None:
        return list(islice(passing, page.offset, _end(page))), total
    if page.sort_by is None:
        chosen = list(passing)
        return chosen[page.offset : _end(page)], len(chosen)
    return _sorted(passing, attrgetter(path + page.sort_by), page)


def result(items: list[M], total: int, page: Page) -> PaginatedResult[M]:
    """A page's items with its place."""
    return PaginatedResult.model_construct(items=items, limit=page.limit, offset=page.offset, total=total)


def _test(model: type[BaseModel], key: str, value: Any, path: str) -> Test:
    """Whether an item passes one filter."""
    if key.endswith("_in"):
        get = attrgetter(path + _comparable(model, key.removesuffix("_in"), "filter"))
        if isinstance(value, str):
            raise StoreError(f"filter {key} is the string {value!r}; it must be a list")
        wanted = frozenset(value)
        return lambda item: get(item) in wanted
    if key.endswith("_contains"):
        get = attrgetter(path + _comparable(model, key.removesuffix("_contains"), "filter"))
        return lambda item: value in (get(item) or "")
    get = attrgetter(path + _comparable(model, key, "filter"))
    return lambda item: get(item) == value


def _sorted(items: Iterable[T], get: Callable[[T], Any], page: Page) -> tuple[list[T], int]:
    """A page of the items in order, and how many there are. Only those up to its end are kept meanwhile."""
    numbers = count()
    counted = (item for item, _ in zip(items, numbers, strict=False))
    descending, end = page.sort_order == "desc", _end(page)

    def key(item: T) -> tuple[bool, Any]:
        value = get(item)
        return (value is None) != descending, value

    if end is None:
        ordered = sorted(counted, key=key, reverse=descending)
    else:
        ordered = (nlargest if descending else nsmallest)(max(end, 1), counted, key=key)  # 0 would count nothing
    return ordered[page.offset : end], next(numbers)


def _end(page: Page) -> int | None:
    return None if page.limit < 0 else page.offset + page.limit


def _check(page: Page) -> None:
    if page.sort_order not in ("asc", "desc"):
        raise StoreError(f"sort_order is {page.sort_order!r}; it must be 'asc' or 'desc'")
    if page.offset < 0:
        raise StoreError(f"offset is {page.offset}; it must be 0 or more")


def _comparable(model: type[BaseModel], name: str, use: str) -> str:
    fields = _comparable_fields(model)
    if name not in fields:
        raise StoreError(f"{use} {name!r} is no field of {model.__name__} that can be compared; use one of {fields}")
    return name


@cache
def _comparable_fields(model: type[BaseModel]) -> list[str]:
    """Fields that are strings or numbers, or may be."""
    return sorted(name for name, field in model.model_fields.items() if _is_scalar(field.annotation))


def _is_scalar(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return True
    options = [option for option in get_args(annotation) if option is not NoneType]
    if options and get_origin(annotation) not in (list, dict, tuple):
        return all(_is_scalar(option) for option in options)
    return annotation in (str, int, float)
