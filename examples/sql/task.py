"""The task: a question about one small table, to be answered by a SQL query over real SQLite, in a few turns.

The question says "age" or "pay"; in half of the databases the column has another name, and only the answer
to a failing query tells which. Invariants: the questions of the three sets are disjoint, and the same under
every seed (the seed draws the databases); a query for another question about the same table is never correct;
whatever the query, running it changes nothing and ends soon. What to do with an answer is left to the agent.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

MAX_TURNS = 3
"""Assistant messages in a conversation."""
MAX_TOKENS = 24
"""New tokens in an assistant message, its end token included."""
DONE = "DONE"
"""What the agent says instead of a query when it has nothing more to ask."""

TABLES = [
    "band",
    "board",
    "cast",
    "choir",
    "class",
    "club",
    "crew",
    "fleet",
    "guild",
    "panel",
    "shift",
    "squad",
    "staff",
    "team",
    "troop",
    "unit",
]
PEOPLE = [
    "ann",
    "ben",
    "cleo",
    "dan",
    "eve",
    "fay",
    "gus",
    "hal",
    "ida",
    "jon",
    "kim",
    "leo",
    "mia",
    "ned",
    "olga",
    "pam",
]
SYNONYMS = {"age": ("years", "old", "yrs"), "pay": ("salary", "wage", "income")}
VALUES = {"age": range(20, 50), "pay": range(30, 70)}
BOUNDS = {"age": (26, 31, 36, 41), "pay": (42, 47, 52, 57)}
AGGREGATES = {"highest": "max(", "lowest": "min(", "mean": "avg(", "total": "sum("}
ORDERS = {"highest": "DESC", "lowest": "ASC"}
COMPARISONS = {"over": ">", "under": "<"}

_SIZES = {"train": 232, "val": 72, "test": 144}
_VISIBLE_ROWS, _TWIN_ROWS = 5, 8
_ANSWER_WORDS = 24
_FUNCTIONS = {"max", "min", "avg", "sum", "count"}
_OPCODES = 100_000

Task = dict[str, Any]
Row = tuple[Any, ...]


@dataclass(frozen=True)
class Question:
    """One question. `concept` is "age" or "pay"; `bound` is set for kind "count" alone."""

    kind: str
    concept: str
    word: str
    table: str
    bound: int | None = None

    def text(self) -> str:
        """The question in words."""
        if self.kind == "count":
            return f"how many in {self.table} have {self.concept} {self.word} {self.bound} ?"
        opening = "what is" if self.kind == "aggregate" else "who has"
        return f"{opening} the {self.word} {self.concept} in {self.table} ?"

    def sql(self, column: str) -> str:
        """The query that answers it where the concept's column is called `column`."""
        if self.kind == "count":
            where = f"WHERE {column} {COMPARISONS[self.word]} {self.bound}"
            return f"SELECT count( * ) FROM {self.table} {where}"
        if self.kind == "aggregate":
            return f"SELECT {AGGREGATES[self.word]} {column} ) FROM {self.table}"
        return f"SELECT name FROM {self.table} ORDER BY {column} {ORDERS[self.word]} LIMIT 1"


def make_tasks(seed: int) -> tuple[list[Task], list[Task], list[Task]]:
    """The train (232), validation (72) and test (144) tasks; JSON-able dicts.

    Keys: question, form (the fields of `Question`), table, columns (name and the two concepts' columns),
    concepts (concept -> its column), gold_sql, rows and twin_rows (lists of lists in the order of columns).
    """
    questions = [question for table in TABLES for question in _questions(table)]
    random.Random(0).shuffle(questions)
    rng = random.Random(f"databases {seed}")
    tasks = iter([_make_task(question, rng) for question in questions])
    train, val, test = ([next(tasks) for _ in range(size)] for size in _SIZES.values())
    return train, val, test


def open_database(task: Task, *, twin: bool = False) -> sqlite3.Connection:
    """The task's database in memory, or its hidden twin. Only reading it is allowed; close it after use."""
    conn = sqlite3.connect(":memory:", check_same_thread=False)
    conn.execute(f"CREATE TABLE {task['table']} ({', '.join(task['columns'])})")
    marks = ", ".join("?" for _ in task["columns"])
    rows = task["twin_rows" if twin else "rows"]
    conn.executemany(f"INSERT INTO {task['table']} VALUES ({marks})", rows)
    conn.commit()
    conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4096)
    conn.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4096)
    conn.set_authorizer(_authorize)
    return conn


def run_query(conn: sqlite3.Connection, sql: str, *, hint: bool = True) -> tuple[list[Row] | None, str]:
    """Run one SELECT: its rows (None when it failed) and the tool's answer, at most 24 words.

    A failure is answered with SQLite's own text and, where `hint` is set, the columns that there are.
    """
    if not sql.lstrip().upper().startswith("SELECT"):
        return None, _failure(conn, "only SELECT can be run", hint)
    steps = iter(range(_OPCODES // 1000))
    conn.set_progress_handler(lambda: next(steps, None) is None, 1000)
    try:
        rows = conn.execute(sql).fetchmany(_ANSWER_WORDS)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        conn.set_progress_handler(None, 0)
        return None, _failure(conn, str(error), hint)
    words = " | ".join(" ".join(map(_cell, row)) for row in rows).split()
    return rows, " ".join(["rows", *words[: _ANSWER_WORDS - 1]] if words else ["rows", "none"])


def is_correct(task: Task, sql: str) -> bool:
    """Whether the query returns the gold query's rows on the task's database and on its hidden twin."""
    return all(rows[0] is not None and rows[0] == rows[1] for rows in _on_both(task, [sql, task["gold_sql"]]))


def _questions(table: str) -> Iterator[Question]:
    for concept in SYNONYMS:
        yield from (Question("aggregate", concept, word, table) for word in AGGREGATES)
        yield from (Question("superlative", concept, word, table) for word in ORDERS)
        for word in COMPARISONS:
            yield from (Question("count", concept, word, table, bound) for bound in BOUNDS[concept])


def _make_task(question: Question, rng: random.Random) -> Task:
    concepts = {c: c if rng.random() < 0.5 else rng.choice(names) for c, names in SYNONYMS.items()}
    task: Task = {
        "question": question.text(),
        "form": asdict(question),
        "table": question.table,
        "columns": ["name", *concepts.values()],
        "concepts": concepts,
        "gold_sql": question.sql(concepts[question.concept]),
    }
    others = [q.sql(concepts[q.concept]) for q in _questions(question.table) if q != question]
    while True:
        task["rows"], task["twin_rows"] = _draw_rows(_VISIBLE_ROWS, rng), _draw_rows(_TWIN_ROWS, rng)
        visible, hidden = _on_both(task, [task["gold_sql"], *others])
        answers = list(zip(visible, hidden, strict=True))
        if answers[0] not in answers[1:]:
            return task


def _draw_rows(count: int, rng: random.Random) -> list[list[Any]]:
    columns = [_draw(concept, count, rng) for concept in VALUES]
    return [list(row) for row in zip(rng.sample(PEOPLE, count), *columns, strict=True)]


def _draw(concept: str, count: int, rng: random.Random) -> list[int]:
    """Values without ties and off the bounds, so that a question has one answer; their mean is whole."""
    pool = [value for value in VALUES[concept] if value not in BOUNDS[concept]]
    while True:
        values = rng.sample(pool, count)
        if sum(values) % count == 0:
            return values


def _on_both(task: Task, queries: list[str]) -> list[list[list[Row] | None]]:
    """Each query's rows, on the database and then on its twin."""
    answers = []
    for twin in (False, True):
        with closing(open_database(task, twin=twin)) as conn:
            answers.append([run_query(conn, sql)[0] for sql in queries])
    return answers


def _authorize(action: int, arg1: str | None, arg2: str | None, *_: str | None) -> int:
    """SQLite asks this for each thing that a statement would do."""
    known = arg2 in _FUNCTIONS if action == sqlite3.SQLITE_FUNCTION else True
    allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION) and known
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _failure(conn: sqlite3.Connection, text: str, hint: bool) -> str:
    answer = "error: " + " ".join(text.split()[: _ANSWER_WORDS // 2])
    if not hint:
        return answer
    (table,) = conn.execute("SELECT name FROM sqlite_master").fetchone()
    columns = [column[0] for column in conn.execute(f"SELECT * FROM {table}").description]
    return f"{answer} ; columns {' '.join(columns)}"


def _cell(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
