"""A run's folder, its figures, the order of its tasks and what it prints."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lightning_ray.data import Epochs
from lightning_ray.errors import ConfigError
from lightning_ray.evaluation import evaluate
from lightning_ray.progress import Reporter, advance, as_current, fitting, short_seconds, step_line
from lightning_ray.run.folder import KEEP_CHECKPOINTS, RunFolder, write_json
from lightning_ray.run.state import PolicyState, RunState
from lightning_ray.run.summary import summarize, summary_table
from lightning_ray.trackers.jsonl import JsonlTracker
from lightning_ray.trajectories.episode import Episode
from lightning_ray.types import Rollout


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "runs" / "sql")
    made.create(resume=False)
    return made


def checkpoint(folder: RunFolder, step: int, **state: Any) -> Path:
    writing = folder.begin_checkpoint(step)
    writing.mkdir()
    (writing / "model.safetensors").write_text(f"weights {step}")
    return folder.commit_checkpoint(writing, step, {"step": step, **state})


def test_a_second_run_of_a_name_keeps_the_first(folder: RunFolder) -> None:
    for number in range(3):
        (folder.path / "mine.txt").write_text(str(number))
        os.utime(folder.path, (1e9, 1e9))
        folder.create(resume=False)
    kept = sorted(path for path in folder.path.parent.iterdir() if path != folder.path)
    assert [(path / "mine.txt").read_text() for path in kept] == ["0", "1", "2"]
    assert all(path.name.startswith("sql-2001") for path in kept)
    assert not (folder.path / "mine.txt").exists()
    assert "--name sql --resume" in (folder.path / "README.md").read_text()


def test_there_must_be_something_to_resume(folder: RunFolder, tmp_path: Path) -> None:
    for empty in (folder, RunFolder(tmp_path / "never")):
        with pytest.raises(ConfigError, match=r"--resume: .* has no finished checkpoint; start the run without"):
            empty.create(resume=True)
    assert not (tmp_path / "never").exists()
    checkpoint(folder, 1)
    folder.create(resume=True)
    assert folder.read_state() == {"step": 1}
    assert [path.name for path in folder.path.parent.iterdir()] == ["sql"]


def test_a_checkpoint_that_was_not_finished_is_not_there(folder: RunFolder) -> None:
    folder.begin_checkpoint(5).mkdir()
    assert folder.latest_checkpoint() is None
    checkpoint(folder, 4)
    half = folder.begin_checkpoint(5)
    assert not half.exists()
    half.mkdir()
    latest = folder.latest_checkpoint()
    assert latest is not None and latest.name == "step-000004" and folder.read_state()["step"] == 4


def test_a_crash_before_the_pointer_leaves_the_checkpoint_before(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(folder, 4)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint(folder, 5)
    latest = folder.latest_checkpoint()
    assert latest is not None and (latest / "model.safetensors").read_text() == "weights 4"
    checkpoint(folder, 5)
    assert folder.read_state()["step"] == 5


def test_only_the_last_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (8, 9, 10, 100, 101):
        checkpoint(folder, step)
    names = sorted(path.name for path in folder.checkpoints.iterdir() if path.is_dir())
    assert names == ["step-000010", "step-000100", "step-000101"] and len(names) == KEEP_CHECKPOINTS
    assert (folder.checkpoints / "latest").read_text() == "step-000101"


@pytest.mark.parametrize(("keep", "last"), [(None, [6, 7, 8]), (1, [8]), (5, [4, 5, 6, 7, 8])])
def test_the_best_validated_checkpoint_is_kept_too(folder: RunFolder, keep: int | None, last: list[int]) -> None:
    settings = {} if keep is None else {"keep_checkpoints": keep}
    write_json(folder.path / "config.json", {"algorithm": settings})
    rewards = {2: 0.7, 3: 0.9, 4: 0.2, 8: 0.1}
    for step in range(1, 9):
        for mode in ("greedy", "sampled") if step in rewards else ():
            reward = rewards[step] if mode == "greedy" else 1 - rewards[step]
            with (folder.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "val", "mode": mode, "step": step, "reward": reward}) + "\n")
        checkpoint(folder, step)
    assert list(folder.kept()) == [3, *last]
    assert folder.best([2, 4, 8]) == 2 and folder.best([1, 5]) is None


def test_what_is_no_checkpoint_and_a_broken_line_do_no_harm(folder: RunFolder) -> None:
    mine = folder.checkpoints / "step-000001-mine"
    mine.mkdir()
    (folder.path / "metrics.jsonl").write_text('{"kind": "val", "mo{"kind": "train"}\n')
    for step in range(1, 6):
        checkpoint(folder, step)
    assert mine.is_dir() and list(folder.kept()) == [1, 2, 3, 4, 5]
    (folder.path / "metrics.jsonl").unlink()
    checkpoint(folder, 6)
    assert list(folder.kept()) == [4, 5, 6] and mine.is_dir()


def test_a_checkpoint_made_again_replaces_the_old_one(folder: RunFolder) -> None:
    checkpoint(folder, 1, loss=1)
    checkpoint(folder, 1, loss=2)
    assert folder.read_state() == {"step": 1, "loss": 2}


def row(kind: str, step: int, reward: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "reward": reward, **more}


def keep(folder: RunFolder, rows: Iterable[dict[str, Any]]) -> None:
    tracker = JsonlTracker(folder.path / "metrics.jsonl")
    for each in rows:
        tracker.log(each)


def test_a_resume_forgets_what_will_be_made_again_and_nothing_else(folder: RunFolder) -> None:
    """Training rows are numbered from 0; a validation row has the number of steps made before it."""
    folder.truncate_metrics(3)
    rows = [row("val", 0), *[row("train", step) for step in range(5)], row("val", 3), row("val", 5), row("test", 0)]
    keep(folder, rows)
    folder.truncate_metrics(3)
    found = [(each["kind"], each["step"]) for each in folder.metrics()]
    assert found == [("val", 0), ("train", 0), ("train", 1), ("train", 2), ("val", 3), ("test", 0)]


def test_what_a_step_settled_is_a_line_and_is_forgotten_with_it(folder: RunFolder) -> None:
    assert folder.steps() == {}
    for step in (0, 1, 2, 2):
        folder.append_step({"step": step, "version": step, "groups": [["g", ["a", "b"]]], "trained": 2})
    with (folder.path / "steps.jsonl").open("a") as file:
        file.write('{"step": 3, "gro')
    folder.truncate_metrics(2)
    folder.append_step({"step": 2, "version": 7, "groups": [], "trained": 0})
    assert {step: line["version"] for step, line in folder.steps().items()} == {0: 0, 1: 1, 2: 7}


def test_the_record_of_a_step_keeps_the_order_of_its_groups() -> None:
    from lightning_ray.algorithms.loop import Played

    played = Played(group_of={"b": "g2", "a": "g2", "c": "g1"}, groups=["g2", "g1"])
    assert played.record(3, {"policy": 5}) == {
        "step": 3,
        "version": 5,
        "groups": [("g2", ["b", "a"]), ("g1", ["c"])],
        "trained": 0,
    }


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("train", step, step / 20) for step in range(20)]
        + [row("val", step, 0.5, mode=mode) for step in (0, 10) for mode in ("sampled", "greedy")],
        [row("train", 0, None), row("val", 0, None, mode="greedy")],
    ],
)
@pytest.mark.filterwarnings("ignore:No artists")
def test_the_plots_are_pictures(folder: RunFolder, rows: list[dict[str, Any]]) -> None:
    keep(folder, rows)
    folder.plot()
    for name in ("reward.png", "training.png"):
        assert (folder.path / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_an_interrupted_run_has_pictures_of_the_steps_it_made(folder: RunFolder) -> None:
    picture = folder.path / "training.png"
    folder.plot_interrupted()
    keep(folder, [row("val", 0, 0.5, mode="greedy")])
    folder.plot_interrupted()
    assert not picture.exists()
    keep(folder, [row("train", 0, 0.1), row("train", 1, 0.2)])
    folder.plot_interrupted()
    drawn = picture.stat().st_mtime_ns
    folder.plot_interrupted()
    assert picture.stat().st_mtime_ns == drawn, "drawn again though nothing came"
    keep(folder, [row("train", step, 0.1) for step in range(3)])
    folder.plot_interrupted()
    assert picture.stat().st_mtime_ns > drawn


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(file, {"path": tmp_path, "n": 1})
    assert json.loads(file.read_text()) == {"path": str(tmp_path), "n": 1}
    circle: dict[str, Any] = {}
    circle["self"] = circle
    with pytest.raises(ValueError):
        write_json(file, circle)
    assert json.loads(file.read_text())["n"] == 1


# Figures


def episode(reward: float | None, status: Any = "succeeded", calls: int = 1, **annotations: list[float]) -> Episode:
    rollout = Rollout(rollout_id="ro", input={}, start_time=0.0, status=status)
    return Episode(rollout, [], reward, annotations, calls, 10 * calls)


def test_an_evaluation_is_means_over_what_succeeded_and_over_events() -> None:
    figures = evaluate(
        [
            episode(1.0, calls=3, valid=[1.0, 1.0, 1.0]),
            episode(0.0, calls=1, valid=[0.0], other=[5.0]),
            episode(1.0, "failed", calls=2, valid=[0.0] * 9),
            episode(None),
        ]
    )
    told = figures.as_dict()
    assert (figures.tasks, figures.failed, figures.reward, figures.turns) == (4, 2, 0.5, 2.0)
    assert figures.sampled_tokens == 70
    assert told["annotations"] == {"other": 5.0, "valid": 0.75}
    assert told["failures"] == {"agent_failed": 1, "no_reward": 1}


def test_an_evaluation_of_nothing_has_no_mean() -> None:
    figures = evaluate([])
    assert (figures.tasks, figures.failed, figures.reward, figures.low, figures.turns) == (0, 0, None, None, None)


def state() -> RunState:
    def found(reward: float, **annotations: float) -> dict[str, Any]:
        return {"reward": reward, "turns": 2.0, "annotations": annotations}

    return RunState(
        step=2,
        step_seconds=[1.0, 2.0, 9.0],
        seconds_to_first_step=1.26,
        rollouts=32,
        policies={"policy": PolicyState(swap_ms=[10.0, 20.0], rollouts_dropped={"no_variance": 8})},
        evaluations={
            "val.sampled_before": found(0.1),
            "val.greedy_before": found(0.2, valid=0.5),
            "val.sampled_after": found(0.6, valid=9.0),
            "val.greedy_after": found(0.7, valid=0.9),
        },
    )


def test_the_summary_has_the_figures_before_and_after() -> None:
    summary = summarize(state(), 61.26, 3_210_000_000)
    assert summary["val"] == {
        "sampled_before": 0.1,
        "greedy_before": 0.2,
        "turns_before": 2.0,
        "valid_before": 0.5,
        "sampled_after": 0.6,
        "greedy_after": 0.7,
        "turns_after": 2.0,
        "valid_after": 0.9,
    }
    assert summary["test"] == {}
    assert (summary["seconds_total"], summary["seconds_to_first_step"], summary["peak_memory_gb"]) == (61.3, 1.3, 3.21)
    assert (summary["step_seconds_median"], summary["swap_ms_median"]) == (2.0, 15.0)
    assert (summary["steps"], summary["rollouts"], summary["rollouts_dropped"]) == (2, 32, {"no_variance": 8})
    json.dumps(summary)


def test_the_summary_of_a_run_without_steps() -> None:
    summary = summarize(RunState(), 0.0, 0)
    assert summary["step_seconds_median"] is None and summary["seconds_to_first_step"] is None
    assert summary_table(RunState()) == ([""], [])


def test_the_closing_table_has_a_row_for_each_figure() -> None:
    columns, rows = summary_table(state())
    assert columns == ["", "val before", "val after"]
    assert rows == [
        ["sampled", "0.10", "0.60"],
        ["greedy", "0.20", "0.70"],
        ["turns", "2.00", "2.00"],
        ["valid", "0.50", "0.90"],
    ]


# Order of the tasks


def test_every_epoch_is_a_permutation_and_they_differ() -> None:
    epochs = Epochs(list(range(50)), seed=1)
    first, second = epochs.take(0, 50), epochs.take(50, 50)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second != list(range(50))
    assert Epochs(list(range(50)), seed=2).take(0, 50) != first
    assert epochs.take(0, 50) == first


def test_what_is_taken_does_not_depend_on_where_one_begins() -> None:
    epochs = Epochs("abcdefg", seed=3)  # type: ignore[arg-type]
    whole = epochs.take(0, 40)
    for start in range(20):
        for count in (0, 1, 5, 16):
            assert epochs.take(start, count) == whole[start : start + count]


def test_a_data_set_needs_only_a_length_and_an_index() -> None:
    class Squares:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            assert type(index) is int
            return index * index

    assert sorted(Epochs(Squares(), 0).take(0, 4)) == [0, 1, 4, 9]


# Progress


def reporter() -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(Console(file=out, force_terminal=False, width=60)), out


STEP = {
    "step": 0,
    "reward": 0.123,
    "sampled_tokens_per_s": 12345.6,
    "trained_tokens_per_s": 2345.6,
    "swap_ms": 123.4,
}


def test_each_step_is_one_line_where_there_is_no_terminal() -> None:
    report, out = reporter()
    report.start_steps(0, 30)
    report.step(STEP, 0.5)
    report.step({**STEP, "step": 1, "reward": None, "trained_tokens_per_s": 0.0, "swap_ms": None}, None)
    report.end_steps()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 1/30  reward 0.12  val 0.50  sampled 12346 tok/s  trained 2346 tok/s  swap 123 ms")
    assert second.startswith("step 2/30  reward  -    sampled 12346 tok/s  left ")


def test_a_bar_that_begins_anew_replaces_the_one_before() -> None:
    out = io.StringIO()
    report = Reporter(Console(file=out, force_terminal=True, width=100))
    before = sys.stdout
    report.start_steps(0, 30)
    report.start_steps(3, 30)
    report.end_steps()
    assert sys.stdout is before, "a live bar that is not stopped keeps the terminal"


def test_what_is_left_is_reckoned_from_the_steps_since_the_bar_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1000.0, 1010.0])
    monkeypatch.setattr("lightning_ray.progress.time.perf_counter", lambda: next(clock))
    report, out = reporter()
    report.start_steps(0, 30)
    report.start_steps(10, 30)
    report.step({**STEP, "step": 10}, None)
    assert out.getvalue().rstrip().endswith("left 3m10s"), "19 steps of ten seconds"


def test_the_line_tells_more_where_there_is_room() -> None:
    row = {**STEP, "time.rollouts": 0.619, "turns": 2.5, "update.entropy": 0.123, "update.staleness_mean": 0.0}
    line = step_line(row, None)
    assert line.endswith("swap 123 ms  waiting 62%  turns 2.5  entropy 0.12") and "\n" not in line
    assert fitting(line, len(line)) == line
    assert fitting(line, len(line) - 1).endswith("turns 2.5") and fitting(line, 5) == "reward 0.12"


def test_the_time_left_counts_the_steps_of_this_start_alone() -> None:
    report, out = reporter()
    report.start_steps(8, 10)
    report._began -= 100.0
    report.step({**STEP, "step": 8}, None)
    assert "step 9/10" in out.getvalue() and "left 1m40s" in out.getvalue()


def test_a_note_is_printed_as_it_is() -> None:
    report, out = reporter()
    text = "publishing failed: [/rank] died [red] " + "x" * 80
    report.note(text)
    assert out.getvalue() == text + "\n"


def test_a_table_shows_its_cells_as_they_are() -> None:
    report, out = reporter()
    report.table("t", ["", "val"], [["[/odd]", "1.00"]])
    assert "[/odd]" in out.getvalue() and "1.00" in out.getvalue()


def test_a_stage_tells_its_time_when_it_is_done() -> None:
    report, out = reporter()
    with report.stage("warm start") as stage, as_current(stage):
        advance(1, 2, "epoch")
        assert out.getvalue() == ""
        stage.suffix = "  100 steps"
    advance(2, 2)
    assert "warm start" in out.getvalue() and out.getvalue().endswith("s  100 steps\n")
    with pytest.raises(ValueError), report.stage("second"):
        raise ValueError
    assert "second" not in out.getvalue()


def test_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    report = Reporter(Console(file=out, force_terminal=True, width=120))
    report.start_steps(0, 2)
    report.step(STEP, None)
    report.note("in between")
    report.end_steps()
    assert "step 1/2" in out.getvalue() and "in between" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (59.4, "59.4s"), (60, "1m00s"), (75, "1m15s"), (3601, "60m01s")]
)
def test_short_seconds(seconds: float, text: str) -> None:
    assert short_seconds(seconds) == text


def test_epochs_are_numpys_own_order() -> None:
    """Kept as it is, so that a run resumed with a later release plays the same tasks."""
    order = np.random.default_rng([3, 1]).permutation(5)
    assert Epochs(list(range(5)), 3).take(5, 5) == order.tolist()
