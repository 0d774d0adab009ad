"""What an evaluation makes of its plays, keeps, compares, and refuses; without Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lightning_ray as lr
from lightning_ray.cli import main
from lightning_ray.evaluation.comparison import compare
from lightning_ray.evaluation.figures import Scale, evaluate, figures_of
from lightning_ray.evaluation.plays import Play, calls_by_rollout, plays_of
from lightning_ray.evaluation.report import EvaluationReport, read_report
from lightning_ray.evaluation.settings import EvaluationSettings
from lightning_ray.evaluation.subject import subject_of
from lightning_ray.relay.spend import Spend
from lightning_ray.run.folder import RunFolder
from lightning_ray.semconv import MODEL_CALL_NAMES, SUPERSEDED_SPAN
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.trajectories.episode import Episode
from lightning_ray.types import Rollout

CHAT = MODEL_CALL_NAMES["chat"]


def episode(
    reward: float | None, status: Any = "succeeded", kind: str | None = None, task: Any = None, **metadata: Any
) -> Episode:
    told = {**metadata, **({"failure": {"kind": kind, "reason": f"of {kind}"}} if kind else {})}
    return Episode(
        Rollout(rollout_id="ro", input=task, start_time=1.0, end_time=3.0, status=status, metadata=told), reward=reward
    )


def play(task: int, reward: float | None, failure: str | None = None, **more: Any) -> Play:
    return Play(task=task, key=f"k{task}", rollout_id=f"ro-{task}", reward=reward, failure=failure, **more)


def report(folder: Path, plays: list[Play], title: str = "a", **settings: Any) -> EvaluationReport:
    made = EvaluationSettings(**settings)
    found = EvaluationReport(folder, {"title": title}, "tasks of val", made, "greedy", plays, 1.0)
    folder.mkdir(exist_ok=True)
    found.write()
    return found


def test_failures_are_apart_by_kind_and_nobodys_zero() -> None:
    played = [
        episode(1.0),
        episode(None),
        episode(float("nan")),
        episode(0.5, "failed", "infrastructure"),
        episode(0.5, "failed", "timeout"),
        episode(0.5, "failed", "failed"),
        episode(None, "cancelled"),
    ]
    found = evaluate(played)
    assert found.reward == 1.0 and (found.tasks, found.rollouts, found.failed) == (7, 7, 6)
    kinds = ("no_reward", "reward_not_finite", "infrastructure_failure", "timed_out", "agent_failed", "cancelled")
    assert found.failures == dict.fromkeys(kinds, 1)
    assert found.low is not None and found.low < 0.2 and found.high == 1.0, "six could have been anything"
    counted = evaluate(played, Scale(failed_reward=0.0))
    assert counted.reward == 0.2, "the agent's own count, the infrastructure's and the cancelled do not"
    assert plays_of(played)[3].reason == "of infrastructure"


def test_figures_by_task_and_tag() -> None:
    played = [
        episode(reward, task={"tags": ["hard", "sql"], "tag": "x"} if number else {"tag": "easy"}, task_number=number)
        for number, reward in ((0, 1.0), (0, 0.0), (1, 0.0), (1, None))
    ]
    plays = [replace(each, task=number) for each, number in zip(plays_of(played), (0, 0, 1, 1), strict=True)]
    found = figures_of(plays, Scale(pass_at=(1, 2)))
    assert (found.tasks, found.reward, found.seconds) == (2, 0.25, 2.0)
    assert {tag: (each.tasks, each.failed, each.reward.value) for tag, each in found.tags.items()} == {
        "easy": (1, 0, 0.5),
        "hard": (1, 1, 0.0),
        "sql": (1, 1, 0.0),
        "x": (1, 1, 0.0),
    }
    assert found.pass_at["1"].value == 0.25 and found.pass_at["2"].value == 1.0
    assert [each.tags for each in plays_of(played[:1], tags=lambda task: ["mine", "mine"])] == [("mine",)]


def test_calls_are_counted_by_endpoint_and_a_clients_own_spans_are_not() -> None:
    def row(span_id: str, **more: Any) -> dict[str, Any]:
        base = {"rollout_id": "ro", "attempt_id": "at-2", "sequence_id": 1, "trace_id": "t", "span_id": span_id}
        return {**base, "name": CHAT, "status": "OK", **more}

    tokens = {"prompt_ids": [1, 2], "sampled_ids": [3], "logprobs": [0.0], "weight_versions": [4]}
    usage = {"usage": {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": None}}
    spans = spans_to_batch(
        [
            row("s1", attributes=usage, **tokens),
            row("s2", attributes=usage, **tokens),
            row("s3", name=SUPERSEDED_SPAN, parent_id="s1"),
            row("s4", attempt_id="at-1", attributes=usage, **tokens),
            row("s5", status="ERROR", attributes=usage, **tokens),
            row("s6", attributes={"upstream": "judge", "cost": 0.25, "usage": {"input_tokens": 7, "output_tokens": 5}}),
            row("s7", attributes={"gen_ai.usage.input_tokens": 7}),
            row("s8", name="agentlightning.annotation", attributes={"upstream": "no"}),
        ]
    )
    import pyarrow as pa

    prices = EvaluationSettings(price_input_per_million=1e6, price_output_per_million=1e7)
    found = calls_by_rollout(pa.Table.from_batches([spans]), {"ro": "at-2"}, prices)["ro"]
    assert dict(found.turns) == {"policy": 1, "judge": 1}
    assert found.spend["policy"] == Spend(calls=4, errors=1, prompt_tokens=8, completion_tokens=4, money=48.0)
    assert found.spend["judge"] == Spend(calls=1, prompt_tokens=7, completion_tokens=5, money=0.25)
    [one] = plays_of([episode(1.0)], {"ro": found}, models=("policy",))
    assert (one.turns, one.sampled_tokens, sorted(one.spend)) == (1, 4, ["judge", "policy"])
    named = spans_to_batch([row("s1", model="writer", **tokens), row("s2", model="editor", **tokens)])
    calls = calls_by_rollout(pa.Table.from_batches([named]), {"ro": "at-2"}, prices, ["writer", "editor"])
    [both] = plays_of([episode(1.0)], calls, models=("writer", "editor"))
    assert dict(calls["ro"].turns) == {"writer": 1, "editor": 1} and both.turns == 2


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    plays = [
        play(0, 1.0, tags=("x",), spend={"policy": Spend(calls=2, money=0.5)}, annotations={"fixed": [1.0, 0.0]}),
        play(1, None, "timed_out", reason="ran longer"),
    ]
    made = report(tmp_path / "one", plays, samples=2)
    found = read_report(tmp_path / "one")
    assert found == replace(made, plays=found.plays) and list(found.plays) == plays
    assert found.figures == made.figures and found.figures.annotations == {"fixed": 0.5}
    console = Console(record=True, width=100)
    found.show(console)
    shown = console.export_text()
    assert "pass@2" in shown and "timed_out" in shown and "1 x timed_out: ran longer" in shown and "cost 0.5" in shown
    with pytest.raises(lr.ConfigError, match=r"has no eval.json"):
        read_report(tmp_path)


def test_a_comparison_pairs_tasks_by_their_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report(tmp_path / "a", [play(n, 1.0, tags=("even",) * (n % 2 == 0)) for n in range(8)], "new")
    rest = [replace(play(n + 5, 0.0), key=f"k{n}") for n in range(6)]
    second = report(tmp_path / "b", [*rest, play(20, 1.0), replace(play(21, None, "infrastructure_failure"), key="k6")])
    found = compare(first, second)
    assert found.reward.tasks == 6 and found.reward.difference == 1.0 and found.reward.p == 2 / 64
    assert [line.name for line in found.lines] == ["reward", "reward, even"] and found.lines[1].paired.tasks == 3
    assert found.unpaired == 3, "k6 has no reward in the second, k7 and k20 are in one alone"
    assert compare(second, first).reward.difference == -1.0
    assert main(["eval", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["comparison"]["lines"][0]["paired"]["p"] == 2 / 64 and len(told["reports"]) == 2
    twice = report(tmp_path / "c", [replace(play(n, float(n)), key="same") for n in range(2)])
    assert compare(twice, twice).reward.tasks == 2
    with pytest.raises(lr.ConfigError, match="no task in common"):
        compare(first, twice)


def test_settings_decide_what_is_left_open() -> None:
    assert EvaluationSettings().scale.pass_at == () and EvaluationSettings(samples=6).scale.pass_at == (1, 2, 4)
    assert EvaluationSettings(samples=4, pass_at=[3]).scale.pass_at == (3,)
    assert [EvaluationSettings(samples=n).chosen_sampling(False) for n in (1, 2)] == ["greedy", "sampled"]
    assert EvaluationSettings().chosen_sampling(True) == "agent"
    with pytest.raises(ValueError, match="pass@8 needs at least 8 samples"):
        EvaluationSettings(samples=4, pass_at=[8])


def checkpoint(folder: RunFolder, step: int, reward: float | None) -> None:
    writing = folder.begin_checkpoint(step)
    writing.mkdir()
    for name in ("config.json", "model.safetensors"):
        (writing / name).write_text("{}")
    folder.commit_checkpoint(writing, step, {"policies": {"policy": {"version": step}}})
    if reward is not None:
        row = {"kind": "val", "mode": "greedy", "step": step, "reward": reward}
        with (folder.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def test_subjects_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "sql")
    run.create(resume=False)
    trainer = lr.Trainer(algorithm=lr.GRPO(model=str(tmp_path / "none")), runs_dir=tmp_path, name="sql")
    with pytest.raises(lr.ConfigError, match=r"algorithm.model=.*none.* is not a folder"):
        subject_of(None, trainer)
    with pytest.raises(lr.ConfigError, match="no finished checkpoint"):
        subject_of(run.path, trainer)
    for step, reward in ((10, 0.7), (20, 0.9), (30, 0.9), (40, None)):
        checkpoint(run, step, reward)
    assert subject_of(None, trainer).title.endswith("sql, step 40")
    for name, step in (("sql", 40), ("sql@best", 30), ("sql@20", 20), ("sql@latest", 40)):
        found = subject_of(tmp_path / name, trainer)
        assert found.version() == step and found.models == {"policy": run.checkpoints / f"step-0000{step}"}
    assert subject_of(run.checkpoints / "step-000020", trainer).version() == 20
    for bad, why in (("sql@10", "there are latest, best, initial, 20, 30, 40"), ("sqll@best", "is no folder of a run")):
        with pytest.raises(lr.ConfigError, match=why):
            subject_of(tmp_path / bad, trainer)
    with pytest.raises(lr.ConfigError, match=r"sql@initial: its config.json names no model"):
        subject_of(tmp_path / "sql@initial", trainer)


def test_a_checkpoint_of_several_policies_has_a_model_for_each(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "two")
    run.create(resume=False)
    writing = run.begin_checkpoint(5)
    for name in ("writer", "editor"):
        (writing / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (writing / name / file).write_text("{}")
    run.commit_checkpoint(writing, 5, {"policies": {"writer": {"version": 5}, "editor": {"version": 3}}})
    found = subject_of(run.path, lr.Trainer())
    assert {*found.models} == {"writer", "editor"} and not found.alone
    assert (found.version("writer"), found.version("editor")) == (5, 3)
    assert found.as_dict()["weight_versions"] == {"editor": 3, "writer": 5}
    with pytest.raises(lr.ConfigError, match=r"config.json names no model that it began with"):
        subject_of(f"{run.path}@initial", lr.Trainer())


def test_endpoints_as_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "http://127.0.0.1:1/v1"
    llm = lr.LLM(endpoint=here, model="large", api_key="sk-secret")
    found = subject_of(None, lr.Trainer(initial_resources={"main_llm": llm}, name="none-such"))
    assert found.upstream is not None and found.upstream.own_headers() == {"authorization": "Bearer sk-secret"}
    assert "secret" not in json.dumps(found.as_dict())
    assert subject_of(None, lr.Trainer(name="none-such")).title == "the agent alone"
    with pytest.raises(lr.ConfigError, match=r"Upstream\(model="):
        subject_of(lr.Upstream(base_url=here), lr.Trainer())
    with pytest.raises(lr.ConfigError, match="LR_NO_SUCH_KEY"):
        subject_of(lr.Upstream(base_url=here, model="m", api_key_env="LR_NO_SUCH_KEY"), lr.Trainer())


SCRIPT = """
import lightning_ray as lr

@lr.rollout
def agent(task, llm: lr.LLM):
    return 1.0

lr.Trainer(name="none").fit(agent, [1, 2]{more})
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "has a parameter 'llm', and there is no model to evaluate"),
        (["--split", "test"], "--split test: the script gives fit() no such data set; it gives ['val', 'train']"),
        (["--tasks", "0"], "--tasks 0"),
        (["--checkpoint", "best"], "--checkpoint best is of a run"),
        (["--key-env", "X"], "belong to --endpoint"),
        (["--endpoint", "ftp://x", "--endpoint-model", "m"], "endpoint.base_url"),
        (["--set", "evaluation.sample=3"], "did you mean 'samples'?"),
        (["--run", "no-such-run"], "'no-such-run' is no folder of a run"),
        (["--set", "algorithm.stepz=3"], "there is no such setting"),
    ],
)
def test_bad_input_of_the_command_is_refused_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT.format(more=", val_dataset=[3]"))
    assert main(["eval", "script.py", *arguments]) == 2
    assert expected in capsys.readouterr().err and not Path("runs").exists()


def test_a_script_must_come_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("import lightning_ray as lr\n")
    assert main(["eval", str(script)]) == 2 and "without calling Trainer.fit" in capsys.readouterr().err
