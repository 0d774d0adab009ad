"""A run's good rollouts as conversations, and back: the same tokens are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.cli import main
from lightning_ray.conversations.files import read_conversations
from lightning_ray.export import export
from lightning_ray.store import open_folder
from lightning_ray.trajectories.settings import Keep
from tests.test_doctor import Bench
from tests.test_trajectories import model_call, span

USER = {"role": "user", "content": "one"}
TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run" / "store")


def asked(messages: list[Any], prompt: list[int], sampled: list[int], tools: list[Any] | None = None) -> dict[str, Any]:
    """A captured call of the chat API."""
    request = {"model": "policy", "messages": messages, **({"tools": tools} if tools else {})}
    return {**model_call("", prompt, sampled), "name": "openai.chat.completion", "attributes": {"request": request}}


def traced(messages: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Any]:
    """The same call as its client saw it."""
    attributes = {f"gen_ai.prompt.{i}.{key}": value for i, one in enumerate(messages) for key, value in one.items()}
    attributes |= {"gen_ai.completion.0.role": "assistant"}
    for index, call in enumerate(answer.pop("tool_calls", ())):
        attributes |= {f"gen_ai.completion.0.tool_calls.{index}.{key}": value for key, value in call.items()}
    attributes |= {f"gen_ai.completion.0.{key}": value for key, value in answer.items()}
    return span("", "", name="openai.chat.completion", attributes=attributes)


def lines(bench: Bench, form: Any = "openai", **more: Any) -> list[dict[str, Any]]:
    made, _ = export(open_folder(bench.folder), form, more.pop("keep", Keep()), **more)
    return list(made)


def said(ids: Any) -> str:
    return " ".join(f"w{each}" for each in ids)


def test_a_trajectory_is_a_conversation_with_its_last_answer(bench: Bench) -> None:
    later = [USER, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "two"}]
    bench.rollout("r", asked([USER], [1, 2], [3]), asked(later, [1, 2, 3, 4], [5, 6]), reward=1.0)
    expected = [*later, {"role": "assistant", "content": "w5 w6"}]
    assert lines(bench, decode=said) == [{"messages": expected}]
    [row] = lines(bench, "huggingface", decode=said, tokens=True)
    assert row == {
        "messages": expected,
        "tools": None,
        "rollout_id": "r",
        "reward": 1.0,
        "token_ids": [1, 2, 3, 4, 5, 6],
        "mask": [0, 0, 1, 0, 1, 1],
    }


def test_the_answer_is_what_the_client_got_tool_calls_and_all(bench: Bench) -> None:
    call = {"id": "c1", "type": "function", "name": "look", "arguments": '{"city": "oslo"}'}
    bench.rollout("r", asked([USER], [1, 2], [3], [TOOL]), traced([USER], {"tool_calls": [call]}), reward=1.0)
    function = {"name": "look", "arguments": '{"city": "oslo"}'}
    answer = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    assert lines(bench) == [{"messages": [USER, answer], "tools": [TOOL]}]
    [row] = lines(bench, "huggingface")
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "oslo"}


def test_what_the_policy_did_not_say_has_no_weight(bench: Bench) -> None:
    example = [USER, {"role": "assistant", "content": "an example"}, USER]
    bench.rollout("r", asked(example, [1, 2, 3], [4]), reward=1.0)
    [row] = lines(bench, decode=said)
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, None]


def test_only_good_training_rollouts_of_the_attempt_that_counts(bench: Bench) -> None:
    for name, reward in (("a", 0.0), ("b", 1.0), ("c", 0.5)):
        bench.rollout(name, asked([USER], [1], [2]), reward=reward)
    bench.enqueue("v", mode="val")
    bench.play("v", asked([USER], [1], [2]), reward=1.0)
    bench.rollout("f", asked([USER], [1], [2]), status="failed")
    keep = Keep(top_share=0.5, min_reward=0.1)
    assert [row["rollout_id"] for row in lines(bench, "huggingface", decode=said, keep=keep)] == ["b", "c"]


def test_a_call_without_messages_is_counted_and_not_written(bench: Bench) -> None:
    bench.rollout("r", model_call("", [1], [2]), reward=1.0)
    bench.store.close()
    made, counts = export(open_folder(bench.folder), "openai", Keep(), decode=said)
    assert list(made) == [] and (counts.kept, counts.without_messages, counts.conversations) == (1, 1, 0)


def test_the_command(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.rollout("r", asked([USER], [1], [2]), traced([USER], {"content": "hello"}), reward=1.0)
    bench.rollout("s", asked([USER], [1], [2]), traced([USER], {"content": "hello"}), reward=0.0)
    bench.store.close()
    run, out = str(bench.folder.parent), tmp_path / "out.jsonl"
    assert main(["export", run, str(out), "--min-reward", "0.5"]) == 0
    assert "1 conversations of 1 of 2 rollouts, below_min_reward 1" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"messages": [USER, {"role": "assistant", "content": "hello"}]}
    assert len(list(read_conversations(out))) == 1, "it can be trained on here"
    for wrong, complaint in (
        (["--tokens"], "no place for them"),
        (["--top", "2"], "less than or equal to 1"),
        (["--agent", "("], "no regular expression"),
        (["--min-reward", "2"], "nothing of"),
    ):
        assert main(["export", run, str(out), *wrong]) == 2
        assert complaint in capsys.readouterr().err


def test_a_folder_without_a_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out.jsonl")]) == 2
    assert "holds no span store" in capsys.readouterr().err
