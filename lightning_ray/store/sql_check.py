"""What a query is allowed to be, and what it needs: a look at its syntax tree before anything is read.

A query is one SELECT (WITH, FROM, VALUES, DESCRIBE, SUMMARIZE are) whose rows come from tables, and from a few
functions that make rows out of their arguments. The needs may be more than a query reads, never less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from threading import Lock
from typing import Any

from lightning_ray.errors import StoreError
from lightning_ray.store.sql_tables import EVERYTHING, SMALLEST, TABLES, Needs

_ROW_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})
_WHOLE = frozenset({"workers", "resources"})
"""Tables read with all columns: they are small, and what several shards have of them can be merged."""
_lock = Lock()


def duckdb() -> Any:
    """The module. Raises StoreError if it is not installed."""
    try:
        import duckdb as module
    except ImportError as error:
        raise StoreError("SQL needs DuckDB, which is not installed; run: pip install 'duckdb>=2'") from error
    return module


def checked(query: str) -> Needs:
    """What the query needs. Raises StoreError for what is no SELECT, or takes its rows from elsewhere."""
    nodes = list(_nodes(_parsed(query)))
    for node in nodes:
        if node.get("type") == "TABLE_FUNCTION":
            name = node["function"].get("function_name", "").lower()
            if name not in _ROW_FUNCTIONS:
                raise StoreError(f"{name}() cannot be read from: SQL reads the tables {', '.join(TABLES)} and no files")
    named = {node["table_name"].lower() for node in nodes if node.get("type") == "BASE_TABLE"}
    with_names = {entry["key"].lower() for node in nodes for entry in node.get("cte_map", {}).get("map", ())}
    if named - set(TABLES) - with_names or any(node.get("type") == "SHOW_REF" for node in nodes):
        return EVERYTHING
    words = {word.lower() for node in nodes for word in _words(node)}
    whole = any(_takes_all(node) for node in nodes) or bool(_row_names(nodes) & _lone_names(nodes))
    return {
        table: frozenset(columns) if whole or table in _WHOLE else frozenset(words & set(columns) or {SMALLEST[table]})
        for table, columns in TABLES.items()
        if table in named
    }


def _parsed(query: str) -> Any:
    module = duckdb()
    try:
        with _lock:
            statements = module.extract_statements(query)
            if len(statements) == 1 and statements[0].type == module.StatementType.SELECT:
                asked = "SELECT json_serialize_sql(?::VARCHAR, skip_empty := true, skip_null := true)"
                tree = json.loads(_parser().execute(asked, [query]).fetchall()[0][0])
            else:
                tree = None
    except module.Error as error:
        raise StoreError(f"the SQL cannot be read: {error}") from error
    if tree is None:
        kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
        kinds = ", ".join(statement.type.name for statement in statements)
        raise StoreError(f"the SQL is {len(statements)} statements ({kinds}); give one SELECT")
    if tree["error"]:
        raise StoreError(f"the SQL cannot be read: {tree.get('error_message')}; give one SELECT")
    return tree["statements"]


@cache
def _parser() -> Any:
    """A database without data, for its parser."""
    return duckdb().connect(":memory:", config={"enable_external_access": "false", "threads": "1"})


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(inner)


def _words(node: dict[str, Any]) -> Iterator[str]:
    for value in node.values():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str):
                yield word


def _takes_all(node: dict[str, Any]) -> bool:
    by_place = node.get("class") in ("STAR", "POSITIONAL_REFERENCE") or bool(node.get("column_name_alias"))
    return by_place or node.get("ref_type") == "NATURAL"


def _row_names(nodes: list[dict[str, Any]]) -> set[str]:
    """Names by which a whole row could be meant."""
    named = {node.get("alias", "") for node in nodes if node.get("type") in ("BASE_TABLE", "SUBQUERY", "JOIN")}
    return {name.lower() for name in named} | set(TABLES)


def _lone_names(nodes: list[dict[str, Any]]) -> set[str]:
    return {node["column_names"][0].lower() for node in nodes if len(node.get("column_names", ())) == 1}
