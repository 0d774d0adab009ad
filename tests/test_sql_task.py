"""The SQL example's task and tokenizer: disjoint questions, honest rewards, bounded queries, exact tokens."""

from __future__ import annotations

import json
import random
from contextlib import closing

import pytest

from examples.sql.demonstrations import demonstrate
from examples.sql.model import END, START, make_tokenizer, vocabulary
from examples.sql.task import (
    MAX_TOKENS,
    MAX_TURNS,
    Question,
    is_correct,
    make_tasks,
    open_database,
    run_query,
)


@pytest.fixture(scope="module")
def tasks():
    return make_tasks(3)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def renamed(tasks):
    """A task whose column is not called what the question calls it."""
    return next(t for t in tasks[0] if t["concepts"][t["form"]["concept"]] != t["form"]["concept"])


def test_sets_are_disjoint_and_no_seed_moves_a_question():
    seen = []
    for seed in (0, 1):
        questions = [{task["question"] for task in tasks} for tasks in make_tasks(seed)]
        assert [len(texts) for texts in questions] == [232, 72, 144]
        assert len(set.union(*questions)) == 448
        seen.append(questions)
    assert seen[0] == seen[1]


def test_tasks_are_json_and_the_same_at_every_call(tasks):
    assert make_tasks(3) == tasks == tuple(json.loads(json.dumps(tasks)))


def test_gold_is_correct_everywhere(tasks):
    assert all(is_correct(task, task["gold_sql"]) for split in tasks for task in split)


def test_a_query_for_another_question_is_refused(tasks):
    lucky = 0
    for task in tasks[0]:
        form = Question(**task["form"])
        for other in tasks[2]:
            if other["table"] != task["table"]:
                continue
            question = Question(**other["form"])
            assert question != form
            sql = question.sql(task["concepts"][question.concept])
            assert not is_correct(task, sql)
            with closing(open_database(task)) as conn:
                lucky += run_query(conn, sql)[0] == run_query(conn, task["gold_sql"])[0]
    assert lucky, "no query was right by accident: the hidden twin was not put to the test"


def test_a_constant_that_fits_the_visible_rows_is_refused(tasks):
    task = next(t for t in tasks[0] if t["form"]["kind"] == "aggregate")
    with closing(open_database(task)) as conn:
        ((answer,),) = run_query(conn, task["gold_sql"])[0]
        assert run_query(conn, f"SELECT {answer}")[0] == [(answer,)]
    assert not is_correct(task, f"SELECT {answer}")


def test_failing_query_is_answered_with_the_columns_unless_the_hint_is_off(tasks):
    task = renamed(tasks)
    word = task["form"]["concept"]
    blind = Question(**task["form"]).sql(word)
    with closing(open_database(task)) as conn:
        hint = f" ; columns {' '.join(task['columns'])}"
        assert run_query(conn, blind) == (None, f"error: no such column: {word}{hint}")
        assert run_query(conn, blind, hint=False) == (None, f"error: no such column: {word}")


def test_result_is_answered_in_words(tasks):
    task = tasks[0][0]
    with closing(open_database(task)) as conn:
        rows, answer = run_query(conn, f"SELECT * FROM {task['table']}")
        assert rows == [tuple(row) for row in task["rows"]]
        assert answer == "rows " + " | ".join(" ".join(map(str, row)) for row in task["rows"])
        assert run_query(conn, f"SELECT name FROM {task['table']} WHERE 1 > 2") == ([], "rows none")


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("DROP TABLE {table}", "only SELECT can be run"),
        ("DELETE FROM {table}", "only SELECT can be run"),
        ("SELECT 1 ; DELETE FROM {table}", "one statement at a time"),
        ("SELECT load_extension( 1 )", "not authorized"),
        ("SELECT zeroblob( 1000000000 )", "not authorized"),
        ("SELECT 1 FROM pragma_journal_mode( 'off' )", "not authorized"),
        ("SELECT count( * ) FROM {product}", "interrupted"),
        ("SELECT \x00", "null character"),
        ("SELECT \ud800", "surrogates"),
        ("SELECT " + "( " * 5000, "too large"),
        ("", "only SELECT can be run"),
    ],
)
def test_nothing_is_written_and_no_query_is_long(tasks, sql, complaint):
    task = tasks[0][0]
    product = " , ".join(f"{task['table']} t{index}" for index in range(20))
    with closing(open_database(task)) as conn:
        rows, answer = run_query(conn, sql.format(table=task["table"], product=product))
        assert rows is None
        assert complaint in answer
        assert run_query(conn, f"SELECT count( * ) FROM {task['table']}") == ([(5,)], "rows 5")


def test_every_sequence_survives_decoding_and_encoding(tokenizer):
    words = [index for index, word in enumerate(vocabulary()) if word != END]
    rng = random.Random(0)
    for _ in range(500):
        ids = rng.choices(words, k=rng.randrange(MAX_TOKENS))
        assert tokenizer(tokenizer.decode(ids, skip_special_tokens=True)).input_ids == ids


def test_template_extends_the_sampled_tokens(tokenizer, tasks):
    words = [index for index, word in enumerate(vocabulary()) if word != END]
    end = tokenizer.eos_token_id
    rng = random.Random(1)
    for _ in range(100):
        messages = [{"role": "user", "content": tasks[0][0]["question"]}]
        for _ in range(MAX_TURNS):
            prompt = template(tokenizer, messages)
            sampled = [*rng.choices(words, k=rng.randrange(MAX_TOKENS)), *rng.choice([[end], []])]
            messages.append({"role": "assistant", "content": tokenizer.decode(sampled, skip_special_tokens=True)})
            messages.append({"role": "user", "content": 'error: near "x": syntax error'})
            assert template(tokenizer, messages)[: len(prompt + sampled)] == prompt + sampled


def test_demonstrations_are_written_in_known_words(tokenizer, tasks):
    rng = random.Random(2)
    talks = [talk for task in tasks[0] for talk in demonstrate(task, 4, rng)]
    ids = [template(tokenizer, talk) for talk in talks]
    assert tokenizer.convert_tokens_to_ids("<unk>") not in set().union(*ids)
    assert max(map(len, ids)) < 128
    said = [m["content"].split() for talk in talks for m in talk if m["role"] == "assistant"]
    assert max(map(len, said)) < MAX_TOKENS


def test_demonstrator_succeeds_sometimes_and_seldom_after_an_error(tasks):
    rng = random.Random(5)
    talks = [(task, talk) for task in tasks[0] for talk in demonstrate(task, 4, rng)]
    failed = [talk for _, talk in talks if talk[2]["content"].startswith("error:")]
    mended = [talk for talk in failed if len(talk) > 4 and talk[4]["content"].startswith("rows")]
    assert 0.35 < len(failed) / len(talks) < 0.65
    assert 0.15 < len(mended) / len(failed) < 0.35


def template(tokenizer, messages):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[-2:] == tokenizer.convert_tokens_to_ids([START, "assistant"])
    return ids
