"""SQL over a store: what it sees, what it costs, what it refuses; and the command that asks it."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_ray.cli import main
from lightning_ray.errors import StoreError
from lightning_ray.store.client import LocalStoreClient
from lightning_ray.store.core import SpanStore
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.store.sql import Limits, columns_needed, prepare, run_sql, sql_over_tables, tables_of
from lightning_ray.store.sql_tables import TABLES
from lightning_ray.store.view import open_folder
from lightning_ray.types import LLM, EnqueueRolloutRequest

EXAMPLE = (
    "SELECT agent, avg(reward), quantile_cont(latency_ms, 0.95) FROM spans WHERE weight_version > 10 GROUP BY agent"
)


def call(rollout_id: str, attempt_id: str, number: int, **more: Any) -> dict[str, Any]:
    """A model call of 100 ms times its number."""
    return {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": number,
        "trace_id": "t",
        "span_id": f"{attempt_id}-{number}",
        "name": "openai.chat.completion",
        "start_time": 1000.0 + number,
        "end_time": 1000.0 + number + number / 10,
        "status": "OK",
        "agent": "planner",
        "model": "m",
        "prompt_ids": [1] * number,
        "sampled_ids": [2, 3],
        "logprobs": [-0.5, -0.25],
        "weight_versions": [number + 9, number + 10],
        "finish_reason": "stop",
        "attributes": {"request": {"messages": ["é"]}, "temperature": 0.5, "who": "me", "no": None},
        **more,
    }


def reward(rollout_id: str, attempt_id: str, number: int, value: float) -> dict[str, Any]:
    """An annotation that carries a reward."""
    return {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": number,
        "trace_id": "t",
        "span_id": f"{attempt_id}-{number}",
        "name": "agentlightning.annotation",
        "start_time": 2000.0,
        "end_time": 2000.0,
        "status": "OK",
        "attributes": {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": value},
    }


def fill(store: SpanStore) -> None:
    """Two rollouts: ``a`` is tried twice and ends with reward 1, ``b`` has 0 and then 0.5 and is still at work."""
    store.update_resources("rs-1", {"llm": LLM(endpoint="http://nowhere/v1", model="m", api_key="secret")})
    store.enqueue_many_rollouts(
        [
            EnqueueRolloutRequest(rollout_id="a", input={"question": "why?"}, mode="train", metadata={"task": 3}),
            EnqueueRolloutRequest(rollout_id="b", input="text", mode="val"),
        ]
    )
    first, other = store.dequeue_many_rollouts(2, "w-1", "q-1")
    a1, b1 = first.attempt.attempt_id, other.attempt.attempt_id
    store.append_spans(spans_to_batch([call("a", a1, 1, agent="coder"), reward("a", a1, 2, 0.0)]))
    store.finish_many_attempts([("a", a1, "failed", {"infrastructure": True, "reason": "r"})])
    a2 = store.dequeue_many_rollouts(1, "w-2", "q-2")[0].attempt.attempt_id
    store.append_spans(spans_to_batch([call("a", a2, 3), call("a", a2, 4, reward=9.0)]))
    store.append_spans(spans_to_batch([call("b", b1, 1), reward("b", b1, 2, 0.0), reward("b", b1, 3, 0.5)]))
    store.finish_many_attempts([("a", a2, "succeeded", None)], spans_to_batch([reward("a", a2, 5, 1.0)]))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpanStore]:
    made = SpanStore(tmp_path / "runs" / "r" / "store")
    fill(made)
    yield made
    made.close()


def ask(store: Any, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in run_sql(query, [store]).to_pylist()]


# What SQL sees


def test_the_example_means_what_its_author_meant(store: SpanStore) -> None:
    assert ask(store, EXAMPLE + " ORDER BY agent") == [
        ("coder", 0.0, pytest.approx(100.0)),
        ("planner", pytest.approx((1.0 + 9.0 + 0.5) / 3), pytest.approx(390.0)),
    ]


def test_spans_have_what_is_derived(store: SpanStore) -> None:
    query = (
        "SELECT sequence_id, latency_ms, weight_version, prompt_tokens, sampled_tokens, own_reward, s.reward "
        "FROM spans s JOIN rollouts r USING (rollout_id, attempt_id) WHERE rollout_id = 'a' ORDER BY sequence_id"
    )
    assert ask(store, query) == [
        (3, pytest.approx(300.0), 13, 3, 2, None, 1.0),
        (4, pytest.approx(400.0), 14, 4, 2, 9.0, 9.0),
        (5, 0.0, None, None, None, 1.0, 1.0),
    ]


def test_the_last_reward_of_an_attempt_is_its_own(store: SpanStore) -> None:
    assert ask(store, "SELECT rollout_id, sequence_id, status, reward FROM attempts ORDER BY 1, 2") == [
        ("a", 1, "failed", 0.0),
        ("a", 2, "succeeded", 1.0),
        ("b", 1, "running", 0.5),
    ]
    assert ask(store, "SELECT mode, attempts, reward FROM rollouts ORDER BY 1") == [
        ("train", 2, 1.0),
        ("val", 1, 0.5),
    ]


def test_a_call_without_a_reward_in_its_attempt_has_none(store: SpanStore) -> None:
    store.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id="c", input=1)])
    (claim,) = store.dequeue_many_rollouts(1, "w-3", "q-3")
    store.append_spans(spans_to_batch([call("c", claim.attempt.attempt_id, 1)]))
    assert ask(store, "SELECT reward FROM spans WHERE rollout_id = 'c'") == [(None,)]


def test_the_other_tables(store: SpanStore) -> None:
    query = (
        "SELECT status, input ->> '$.question', metadata ->> 'task', resources_id FROM rollouts ORDER BY mode LIMIT 1"
    )
    assert ask(store, query) == [("succeeded", "why?", "3", "rs-1")]
    assert ask(store, "SELECT input FROM rollouts WHERE rollout_id = 'b'") == [('"text"',)]
    assert ask(store, "SELECT worker_id, status, current_rollout_id FROM workers ORDER BY 1") == [
        ("w-1", "busy", "b"),
        ("w-2", "idle", None),
    ]
    assert ask(store, "SELECT resources_id, version, names, latest FROM resources") == [("rs-1", 1, ["llm"], True)]
    assert ask(store, "SELECT count(*) FROM attempts WHERE seconds >= 0 AND metadata LIKE '%infrastructure%'") == [(1,)]
    assert "secret" not in str([ask(store, f"FROM {table}") for table in TABLES])


def test_tables_are_as_they_are_told_to_be(store: SpanStore) -> None:
    for table, columns in TABLES.items():
        told = [(name, column.type) for name, column in columns.items()]
        assert [row[:2] for row in ask(store, f"DESCRIBE {table}")] == told


def test_an_empty_store_has_empty_tables(tmp_path: Path) -> None:
    empty = SpanStore(tmp_path / "empty")
    for table in TABLES:
        assert ask(empty, f"FROM {table}") == []
    assert ask(empty, EXAMPLE) == [] and ask(empty, "SELECT 1") == [(1,)]
    empty.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("who", "me"),
        ("temperature", "0.5"),
        ("request", '{"messages": ["é"]}'),
        ("no", None),
        ("nothing", None),
        ("agentlightning.reward.0.value", None),
    ],
)
def test_attributes_are_read_by_their_key(store: SpanStore, key: str, value: str | None) -> None:
    assert ask(store, f"SELECT DISTINCT attribute(more, '{key}') FROM spans WHERE model = 'm'") == [(value,)]


def test_attributes_of_other_spans(store: SpanStore) -> None:
    query = "SELECT attribute(more, 'agentlightning.reward.0.value')::DOUBLE FROM spans WHERE model IS NULL ORDER BY 1"
    assert ask(store, query) == [(0.0,), (0.0,), (0.5,), (1.0,)]


# What is read


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("SELECT agent, count(*) FROM spans GROUP BY agent", "spans.agent"),
        ("SELECT count(*) FROM spans", "spans.sequence_id"),
        ('select S.Agent FROM SPANS s ORDER BY "LATENCY_MS"', "spans.latency_ms spans.agent"),
        ("WITH x AS (SELECT reward FROM spans) SELECT max(reward) FROM x", "spans.reward"),
        (
            "SELECT mode FROM rollouts r JOIN spans USING (rollout_id)",
            "spans.rollout_id rollouts.rollout_id rollouts.mode",
        ),
        ("SELECT 1", ""),
    ],
)
def test_only_named_columns_are_needed(query: str, columns: str) -> None:
    assert columns_needed(query) == columns.split()


@pytest.mark.parametrize(
    "query",
    [
        "FROM spans",
        "SELECT s FROM spans s",
        "SELECT spans FROM spans",
        "SELECT #1 FROM spans",
        "SELECT COLUMNS('re.*') FROM spans",
        "SELECT x FROM spans AS t(x)",
        "SELECT 1 FROM spans NATURAL JOIN rollouts",
        "SUMMARIZE spans",
        "PIVOT spans ON agent IN ('a') USING sum(reward)",
        "SELECT (SELECT count(*) FROM information_schema.columns) FROM spans",
    ],
)
def test_all_columns_are_needed_where_names_do_not_tell(query: str) -> None:
    assert {f"spans.{name}" for name in TABLES["spans"]} <= set(columns_needed(query))


def test_columns_that_a_query_does_not_name_are_not_read(store: SpanStore) -> None:
    store.storage.compact()
    (segment,) = store.folder.rglob("*.parquet")
    damage(segment, "prompt_ids", "sampled_ids", "logprobs", "more")
    assert len(ask(store, EXAMPLE)) == 2
    assert ask(store, "SELECT count(*), avg(reward), max(latency_ms) FROM spans") == [(8, 1.5, pytest.approx(400.0))]
    assert ask(store, "SELECT max(reward) FROM rollouts WHERE mode = 'val'") == [(0.5,)]
    for query in ("SELECT sum(prompt_tokens) FROM spans", "SELECT attribute(more, 'who') FROM spans"):
        with pytest.raises(StoreError):
            ask(store, query)


def damage(segment: Path, *columns: str) -> None:
    """Overwrite the pages of some columns."""
    with segment.open("rb+") as file:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                if column.path_in_schema.split(".")[0] in columns:
                    file.seek(column.data_page_offset)
                    file.write(b"\xff" * column.total_compressed_size)


def test_a_picture_is_of_its_moment(store: SpanStore) -> None:
    counted = prepare(
        "SELECT (SELECT count(*) FROM spans), (SELECT count(*) FROM rollouts WHERE end_time IS NULL)", [store]
    )
    b = store.get_latest_attempt("b")
    assert b is not None
    store.finish_many_attempts([("b", b.attempt_id, "succeeded", None)], spans_to_batch([call("b", b.attempt_id, 7)]))
    assert list(counted().to_pylist()[0].values()) == [8, 1]
    assert ask(store, "SELECT count(*) FROM spans") == [(9,)]


def test_log_and_segments_are_read_alike_without_what_was_deleted(store: SpanStore) -> None:
    queries = [EXAMPLE + " ORDER BY 1", "SELECT COLUMNS(* EXCLUDE (more)) FROM spans ORDER BY ALL"]
    before = [ask(store, query) for query in queries]
    store.storage.compact()
    assert [ask(store, query) for query in queries] == before
    store.delete_rollouts(["b"])
    store.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id="c", input=1)])
    attempt_id = store.dequeue_many_rollouts(1, "w-3", "q-3")[0].attempt.attempt_id
    store.append_spans(spans_to_batch([call("c", attempt_id, 0, span_id=str(n)) for n in range(3)]))
    left = [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("a", 5), ("c", 1), ("c", 2), ("c", 3)]
    assert ask(store, "SELECT rollout_id, sequence_id FROM spans ORDER BY 1, 2") == left
    assert ask(store, "SELECT count(*) FROM spans WHERE rollout_id = 'b' OR sequence_id = 0") == [(0,)]


def test_shards_answer_as_one(store: SpanStore, tmp_path: Path) -> None:
    other = SpanStore(tmp_path / "other")
    other.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id="z", input=1, mode="test")])
    attempt_id = other.dequeue_many_rollouts(1, "w-1", "q")[0].attempt.attempt_id
    other.append_spans(spans_to_batch([call("z", attempt_id, 5), reward("z", attempt_id, 6, 0.25)]))
    for query in (
        "SELECT rollout_id, agent, reward, weight_version FROM spans ORDER BY ALL",
        "SELECT r.mode, avg(s.reward), count(*) FROM spans s JOIN rollouts r USING (rollout_id) GROUP BY 1 ORDER BY 1",
        "SELECT worker_id, status FROM workers ORDER BY 1",
        "SELECT attribute(more, 'who'), count(*) FROM spans GROUP BY 1 ORDER BY 1",
    ):
        columns = columns_needed(query)
        parts = [tables_of(shard, columns) for shard in (store, other)]
        answer = sql_over_tables(query, parts)
        assert answer.equals(run_sql(query, [store, other])) and answer.num_rows > 1
    assert ask_all([store, other], "SELECT count(*) FROM workers") == [(2,)]
    assert tables_of(store)["spans"].column_names == list(TABLES["spans"])
    for unknown in ("spans.nothing", "nothing.agent", "agent"):
        with pytest.raises(StoreError, match=f"there is no column '{unknown}'"):
            tables_of(store, [unknown])
    other.close()


def ask_all(stores: list[Any], query: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in run_sql(query, stores).to_pylist()]


async def test_a_store_at_work_answers_beside_its_other_calls(tmp_path: Path) -> None:
    made = SpanStore(tmp_path / "s")
    fill(made)
    client = LocalStoreClient(made)
    slow = asyncio.ensure_future(client.sql("SELECT count(*) FROM range(200000000) a, spans"))
    await asyncio.sleep(0)
    await client.enqueue_rollout(1, rollout_id="n")
    assert not slow.done()
    assert (await client.sql("SELECT count(*) AS n FROM spans")).to_pylist() == [{"n": 8}]
    assert (await slow).num_rows == 1
    with pytest.raises(StoreError, match="no_such"):
        await client.sql("SELECT no_such FROM spans")
    await client.close()


# What is refused

SECRET = "a variable of Python"
ARROW = pa.table({"a": [1]})


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM read_parquet('/tmp/x.parquet')",
        "SELECT * FROM read_json_auto('/etc/passwd')",
        "SELECT * FROM main.read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM 'x.csv'",
        "SELECT * FROM 'https://example.org/x.parquet'",
        "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM (SELECT * FROM read_csv('/etc/passwd'))",
        "SELECT (SELECT content FROM read_text('/etc/passwd'))",
        "WITH x AS (SELECT * FROM read_text('/etc/passwd')) SELECT * FROM x",
        "SELECT 1 WHERE EXISTS (FROM read_text('/etc/passwd'))",
        "SELECT * FROM query('SELECT 1')",
        "SELECT * FROM query_table('spans')",
        "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
        "SELECT * FROM duckdb_settings()",
        "SELECT * FROM duckdb_secrets()",
        "SELECT * FROM which_secret('x', 's3')",
        "SELECT * FROM arrow_scan(1, 2, 3)",
        "SELECT * FROM pandas_scan(1)",
        "SELECT * FROM python_map_function()",
        "SELECT * FROM pragma_version()",
        "SELECT * FROM enable_logging()",
        "SELECT getenv('HOME')",
        "SELECT * FROM ARROW",
        "SELECT * FROM SECRET",
        "SELECT * FROM store",
        "COPY spans TO '/tmp/spans.csv'",
        "COPY (SELECT 1) TO '/tmp/spans.csv'",
        "EXPORT DATABASE '/tmp/spans'",
        "ATTACH '/tmp/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA threads=4",
        "PRAGMA version",
        "SET threads=4",
        "SET VARIABLE x = 1",
        "RESET threads",
        "CALL pragma_version()",
        "CREATE TABLE x AS SELECT 1",
        "CREATE VIEW x AS SELECT 1",
        "CREATE SECRET (TYPE s3)",
        "CREATE MACRO f(x) AS x",
        "DROP VIEW spans",
        "INSERT INTO spans SELECT * FROM spans",
        "DELETE FROM rollouts",
        "UPDATE rollouts SET status = 'failed'",
        "WITH x AS (DELETE FROM rollouts RETURNING *) SELECT * FROM x",
        "EXPLAIN SELECT 1",
        "PREPARE x AS SELECT 1",
        "BEGIN",
        "CHECKPOINT",
        "VACUUM",
        "USE memory",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY spans TO '/tmp/spans.csv'",
        "SELECT $1",
        "",
        ";",
        "nonsense",
    ],
)
def test_what_is_no_question_to_the_tables_is_refused(store: SpanStore, query: str) -> None:
    with pytest.raises(StoreError) as refused:
        run_sql(query, [store])
    assert "root:" not in str(refused.value)
    assert not Path("/tmp/spans.csv").exists()


def test_duckdb_itself_refuses_too(store: SpanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The locks hold without the look at the query before."""
    monkeypatch.setattr("lightning_ray.store.sql.checked", lambda query: {})
    for query in ("SELECT * FROM read_text('/etc/passwd')", "FROM glob('/*')", "FROM ARROW", "SET threads = 4"):
        with pytest.raises(StoreError):
            run_sql(query, [store])


def test_an_unknown_name_is_answered_with_those_that_there_are(store: SpanStore) -> None:
    with pytest.raises(StoreError, match=r"(?s)span does not exist.*Tables: spans, rollouts, attempts"):
        run_sql("SELECT * FROM span", [store])
    with pytest.raises(StoreError, match=r'(?s)"agnet" not found.*Columns of spans: rollout_id, .*latency_ms'):
        run_sql("SELECT agnet FROM spans", [store])
    with pytest.raises(StoreError, match=r"(?s)Columns of rollouts: rollout_id"):
        run_sql("SELECT r.agent FROM rollouts r", [store])


def test_a_long_query_is_broken_off(store: SpanStore) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"longer than 0\.2 s"):
        run_sql("SELECT count(*) FROM range(1000000000000) a, range(1000) b", [store], Limits(seconds=0.2))
    assert time.monotonic() - began < 30
    assert threading.active_count() < 50


def test_a_large_query_is_refused(store: SpanStore) -> None:
    with pytest.raises(StoreError, match="more than 1000000 bytes"):
        run_sql("SELECT * FROM range(1000000000)", [store], Limits(answer_bytes=1_000_000))
    with pytest.raises(StoreError, match=r"(?i)memory"):
        run_sql("SELECT list(range) FROM range(1000000000)", [store], Limits(memory_bytes=50_000_000))


def test_without_duckdb_the_error_names_it(store: SpanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(StoreError, match="pip install 'duckdb"):
        run_sql("SELECT 1", [store])


def test_duckdb_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, lightning_ray, lightning_ray.store, lightning_ray.store.sql; sys.exit('duckdb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# The command


@pytest.fixture
def runs(store: SpanStore, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with ``runs/`` in it is the current one."""
    folder = store.folder.parents[2]
    monkeypatch.chdir(folder)
    return folder


def test_the_command_answers_from_a_store_at_work(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spans", EXAMPLE + " ORDER BY 1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "avg(reward)" in lines[1] and "quantile_cont(latency_ms, 0.95)" in lines[1]
    assert lines[3].split() == ["│", "coder", "│", "0", "│", "100", "│"]
    assert lines[4].split() == ["│", "planner", "│", "3.5", "│", "390", "│"]


@pytest.mark.parametrize("folder", ["runs/r", "runs/r/store"])
def test_the_command_takes_a_runs_folder_or_its_stores(
    runs: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spans", "SELECT count(*) AS n FROM spans", folder, "--format", "json"]) == 0
    assert capsys.readouterr().out == '{"n": 8}\n'


def test_the_last_run_is_the_default(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = SpanStore(runs / "runs" / "later" / "store")
    later.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id="only", input=1)])
    later.close()
    assert main(["spans", "SELECT rollout_id FROM rollouts", "--format", "csv"]) == 0
    assert capsys.readouterr().out == '"rollout_id"\n"only"\n'


def test_the_query_may_come_from_stdin(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 1 AS one,\n 'x' AS x"))
    assert main(["spans", "-", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"one": 1, "x": "x"}


@pytest.mark.parametrize("name", ["out.parquet", "out.arrow", "out.csv", "out.json", "out.txt"])
def test_the_answer_goes_to_a_file_in_the_form_of_its_name(
    runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "SELECT sequence_id, prompt_ids, more FROM spans WHERE rollout_id = 'a' ORDER BY span_id, sequence_id"
    assert main(["spans", query, "--output", name]) == 0 and capsys.readouterr().out == ""
    if name == "out.parquet":
        read = pq.read_table(name)
    elif name == "out.arrow":
        read = pa.ipc.open_file(name).read_all()
    else:
        text = Path(name).read_text()
        assert "[1, 1, 1]" in text and len(text.splitlines()) >= 5
        return
    assert read.equals(run_sql(query, [open_folder("runs/r/store")]))


def test_long_answers_are_cut_for_people(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT range AS i, repeat('x', 100) AS x, 1.5e9 AS t, NULL AS z, [1] AS l FROM range(30)"
    assert main(["spans", query, "--rows", "3", "--width", "10"]) == 0
    told = capsys.readouterr().out
    assert "xxxxxxxxx…" in told and "x" * 11 not in told and "1500000000.000" in told and "[1]" in told
    assert told.splitlines()[-1] == "3 of 30 rows; more with --rows"


def test_the_command_tells_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spans", "--tables"]) == 0
    told = capsys.readouterr().out
    for table, columns in TABLES.items():
        assert table in told and all(name in told and column.what in told for name, column in columns.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "spans: give the SQL"),
        (["SELECT 1", "nowhere"], "nowhere: no such folder"),
        (["SELECT 1", "runs"], "holds no span store"),
        (["SELECT x FROM spans"], 'Binder Error: Referenced column "x" not found'),
        (["SELECT 1; SELECT 2"], "the SQL is 2 statements"),
        (["SELECT * FROM read_csv('/etc/passwd')"], "read_csv() cannot be read from"),
        (["SELECT 1", "--output", "no/such/file.csv"], "--output no/such/file.csv: No such file"),
        (["SELECT 1", "--timeout", "0"], "--timeout 0"),
    ],
)
def test_a_mistake_is_a_message_and_the_code_2(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spans", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and message in told.err and "Traceback" not in told.err


def test_without_runs_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["spans", "SELECT 1"]) == 2
    assert "there is no run with a store" in capsys.readouterr().err


WRITER = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from tests.test_store_sql import call, reward
from lightning_ray.store.core import SpanStore
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.types import EnqueueRolloutRequest
store = SpanStore(sys.argv[1], file_bytes=100_000)
for number in itertools.count():
    store.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id=f"r{number}", input=number)])
    attempt_id = store.dequeue_many_rollouts(1, "w", f"q{number}")[0].attempt.attempt_id
    spans = [call(f"r{number}", attempt_id, 2), reward(f"r{number}", attempt_id, 3, 0.5)]
    store.finish_many_attempts([(f"r{number}", attempt_id, "succeeded", None)], spans_to_batch(spans))
    store.maintain()
    print(number, flush=True)
"""


def test_the_store_of_another_process_is_read_while_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "store"), root], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        try:
            for line in writer.stdout:
                written = int(line)
                if written % 50 == 20:
                    query = "SELECT count(*) AS n, count(DISTINCT rollout_id) AS m, avg(reward) AS r FROM spans"
                    assert main(["spans", query, str(tmp_path), "--format", "json"]) == 0
                    told = json.loads(capsys.readouterr().out)
                    assert told["m"] > written and told["n"] == 2 * told["m"] and told["r"] == 0.5
                if written > 400:
                    break
        finally:
            writer.kill()
