"""Replay, up to the training: what a folder records, the batch from the store, other settings, figures compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.cli import main
from lightning_ray.errors import ConfigError
from lightning_ray.replay.batch import read_step, rebuild, settle_again
from lightning_ray.replay.comparison import compare, differing, tolerance_for
from lightning_ray.replay.record import Beginning, StepRecord, beginning, chain, read_steps
from lightning_ray.replay.settings import changed, model_folder, recorded, settings_of
from lightning_ray.run.folder import RunFolder, write_json
from lightning_ray.store import open_folder
from lightning_ray.trajectories.account import batch_of, settle
from lightning_ray.trajectories.episode import read_episodes
from lightning_ray.trajectories.settings import BatchSettings, GroupPolicy
from tests.test_doctor import Bench, failing, good


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(resume=False)
    return folder


@pytest.fixture
def bench(run: RunFolder) -> Bench:
    return Bench(run.store)


def note(run: RunFolder, step: int, *groups: tuple[str, list[str]], trained: int = 2, **figures: float) -> None:
    run.append_step({"step": step, "version": step + 5, "groups": groups, "trained": trained})
    row = {"kind": "train", "step": step, **{f"update.{name}": value for name, value in figures.items()}}
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def checkpoint(run: RunFolder, step: int) -> Path:
    writing = run.begin_checkpoint(step)
    (writing / "trainer_state").mkdir(parents=True)
    (writing / "trainer_state" / "progress.json").write_text("{}")
    return run.commit_checkpoint(writing, step, {})


# The batch


def test_the_batch_is_that_of_the_step_in_its_order(bench: Bench) -> None:
    """Whatever the order in which rollouts were queued, and with others beside them in the store."""
    for name, reward in (("a", 0.0), ("x", 1.0), ("d", 1.0), ("b", 1.0), ("c", 0.0)):
        bench.rollout(name, good([3, len(name)]), good([4]), reward=reward)
    bench.store.close()
    record = StepRecord(3, 2, [("h", ("d", "c")), ("g", ("b", "a"))], 4)
    view = open_folder(bench.folder)
    table = rebuild(view, record, BatchSettings(), 0)
    assert list(dict.fromkeys(table["rollout_id"].to_pylist())) == ["d", "c", "b", "a"]
    assert list(dict.fromkeys(table["group_id"].to_pylist())) == ["h", "g"]
    rollouts = {rollout.rollout_id: rollout for rollout in view.query_rollouts()}
    ids = ["d", "c", "b", "a"]
    attempts = {each: view.query_attempts(each).items[-1].attempt_id for each in ids}
    episodes = read_episodes([rollouts[each] for each in ids], view.scan_spans(ids), attempts)
    group_of = {"d": "h", "c": "h", "b": "g", "a": "g"}
    assert table.equals(batch_of(settle(episodes, group_of, BatchSettings(), 2).trained, group_of))
    assert table["reward"].to_pylist()[0] == 1.0 and table.num_rows == 8


def test_groups_are_settled_as_the_settings_say(bench: Bench) -> None:
    for name, reward in (("a", 0.0), ("b", 1.0), ("c", 0.5), ("d", 0.5)):
        bench.rollout(name, good(), reward=reward)
    bench.rollout("e", good(), **failing("failed"))
    bench.store.close()
    view = open_folder(bench.folder)
    record = StepRecord(0, 2, [("g", ("a", "b", "e")), ("h", ("c", "d"))], 2)
    account = settle_again(view, record, BatchSettings(), 0)
    assert account.dropped == {"e": "agent_failed", "c": "no_variance", "d": "no_variance"}
    kept = rebuild(view, record, BatchSettings(groups=GroupPolicy(no_variance="keep")), 0)
    assert kept["rollout_id"].to_pylist() == ["a", "b", "c", "d"]
    too_old = StepRecord(0, 4, record.groups, 2)  # the calls are of version 2
    with pytest.raises(ConfigError, match=r"leave none of its 5 rollouts to train on: .*'too_stale': 4"):
        rebuild(view, too_old, BatchSettings(), 1)
    assert rebuild(view, too_old, BatchSettings(), 2).num_rows == 2


def test_the_last_attempt_with_spans_counts(bench: Bench) -> None:
    bench.enqueue("a", {"group_id": "g"})
    bench.play("a", good([7]), status="failed", infrastructure=True, reason="gone")
    bench.play("a", good([8]), reward=1.0)
    bench.store.close()
    [episode] = read_step(open_folder(bench.folder), StepRecord(0, 0, [("g", ("a",))], 1))
    assert episode.trajectories[0].token_ids.tolist() == [1, 2, 8]


def test_a_store_without_the_step_is_told(bench: Bench) -> None:
    bench.rollout("a", good(), reward=1.0)
    bench.store.close()
    with pytest.raises(ConfigError, match=r"step 3 .* lacks 1 of its 2 rollouts, z for one"):
        read_step(open_folder(bench.folder), StepRecord(3, 0, [("g", ("a", "z"))], 2))


# What the folder records


def test_steps_that_came_to_their_end_are_read(run: RunFolder) -> None:
    note(run, 0, ("g", ["a", "b"]), ("h", ["c"]), loss=0.5, trained_tokens=7, seconds=2.0)
    run.append_step({"step": 1, "version": 6, "groups": [], "trained": 1})  # its update was not waited for
    [record] = read_steps(run).values()
    assert record == StepRecord(
        0, 5, [("g", ("a", "b")), ("h", ("c",))], 2, {"loss": 0.5, "trained_tokens": 7.0, "seconds": 2.0}
    )
    assert record.group_of == {"a": "g", "b": "g", "c": "h"}


def test_training_begins_at_the_last_weights_before_the_step(run: RunFolder) -> None:
    assert beginning(run, 3) == Beginning()
    folders = {step: checkpoint(run, step) for step in (2, 4)}
    run.begin_checkpoint(3).mkdir()
    found = {step: beginning(run, step) for step in range(6)}
    assert [each.step for each in found.values()] == [0, 0, 2, 2, 4, 4]
    assert found[5].checkpoint == folders[4] and str(found[5]) == "checkpoints/step-000004"
    assert str(found[0]) == "the initial model"


def test_the_steps_on_the_way_are_trained_save_for_empty_ones(run: RunFolder) -> None:
    for step in range(4):
        note(run, step, trained=0 if step == 1 else 2)
    assert [record.step for record in chain(run, 3)[1]] == [0, 2, 3]
    checkpoint(run, 3)
    start, records = chain(run, 3)
    assert start.step == 3 and [record.step for record in records] == [3]
    for step, message in ((1, "trained nothing"), (4, "recorded are 0 to 3")):
        with pytest.raises(ConfigError, match=message):
            chain(run, step)


def test_a_gap_on_the_way_is_told(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="no step is recorded"):
        chain(run, 0)
    note(run, 4)
    with pytest.raises(ConfigError, match=r"weights before it are the initial model, .* \[0, 1, 2, 3\] are not"):
        chain(run, 4)
    checkpoint(run, 4)
    assert [record.step for record in chain(run, 4)[1]] == [4]


# Settings


def kept(run: RunFolder, **settings: Any) -> dict[str, Any]:
    """The settings as a run's config.json has them, read back."""
    algorithm = GRPO(model=str(run.path / "model"), **settings)
    write_json(run.path / "config.json", {"algorithm": {"name": "GRPO", **algorithm.settings()}})
    return recorded(run.path)


@pytest.mark.parametrize("preset", [None, "grpo", "dr-grpo", "dapo", "reinforce++"])
def test_settings_come_back_as_they_were(run: RunFolder, preset: Any) -> None:
    values = kept(run, preset=preset, learning_rate=3e-4, batch={"max_tokens": 99})
    assert settings_of(values, run.path) == GRPO(
        model=str(run.path / "model"), preset=preset, learning_rate=3e-4, batch={"max_tokens": 99}
    )


def test_others_take_their_place(run: RunFolder) -> None:
    values = kept(run, reference={"coefficient": 0.5})
    other = changed(values, ["algorithm.loss=cispo", "algorithm.batch.groups.no_variance=keep"])
    assert (other.loss, other.batch.groups.no_variance, other.reference.coefficient) == ("cispo", "keep", 0.5)
    assert settings_of(values, run.path).loss == "vanilla", "what was read is left as it is"


def test_a_preset_takes_the_place_of_what_papers_decide(run: RunFolder) -> None:
    values = kept(run, preset="grpo", learning_rate=3e-4, batch={"max_tokens": 99})
    other = changed(values, ["algorithm.preset=dapo", "algorithm.clip_low=0.1"])
    plain = GRPO(model="m", preset="dapo", clip_low=0.1, learning_rate=3e-4, batch={"max_tokens": 99})
    assert {**other.model_dump(), "model": "m"} == plain.model_dump()
    assert other.reference.coefficient == 0 and other.batch.overlong is not None and other.clip_high == 0.28


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("algorithm.group_size=4", "a replay cannot change it"),
        ("algorithm.lora.rank=4", "a replay cannot change it"),
        ("algorithm.los=cispo", "did you mean 'algorithm.loss'"),
        ("n_runners=4", "there is no such setting"),
        ("algorithm.loss=nothing", "algorithm.loss='nothing'"),
        ("algorithm.loss", "write key=value"),
    ],
)
def test_what_a_replay_cannot_follow_is_refused(run: RunFolder, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(kept(run), [given])


def test_the_initial_model_is_found_or_asked_for(run: RunFolder, tmp_path: Path) -> None:
    settings = GRPO(model="<function make at 0x7f>")
    with pytest.raises(ConfigError, match="with --model FOLDER"):
        model_folder(run.path, settings)
    for folder in (tmp_path / "moved", run.path / "model"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert model_folder(run.path, settings) == run.path / "model"
    assert model_folder(run.path, settings, tmp_path / "moved") == tmp_path / "moved"


# Figures


def test_figures_lie_beside_each_other() -> None:
    told, again = {"loss": 1.0, "seconds": 3.0, "old": 1.0}, {"loss": 1.5, "new": 2.0}
    loss, old, new = compare(told, again)
    assert (loss.name, loss.recorded, loss.replayed, loss.difference) == ("loss", 1.0, 1.5, 0.5)
    assert (old.replayed, old.difference, new.recorded, new.replayed) == (None, None, None, 2.0)
    [line] = compare({"loss": 1.0}, {"loss": 1.0}, {"loss": 4.0})
    assert (line.changed, line.difference) == (4.0, 3.0)


def test_figures_differ_by_more_than_rounding() -> None:
    told = {"loss": 0.5, "grad_norm": 100.0, "absent": 1.0, "odd": math.nan}
    assert differing(told, {"loss": 0.5 + 9e-7, "grad_norm": 100.00009, "odd": math.nan}, 1e-6) == []
    assert differing(told, {"loss": 0.5 + 2e-6, "grad_norm": 100.0002, "odd": 1.0}, 1e-6) == [
        "loss",
        "grad_norm",
        "odd",
    ]
    assert tolerance_for(True, "float32") < tolerance_for(False, "float32") < tolerance_for(True, "bfloat16")


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--step", "9"], "recorded are 0 to 0"),
        (["RUN", "--step", "0", "--set", "algorithm.steps=3"], "a replay cannot change it"),
        (["RUN", "--step", "0", "--tolerance", "-1"], "at least 0"),
        (["RUN", "--step", "0"], "the run's initial model is not in"),
        (["nowhere", "--step", "0"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(
    bench: Bench, run: RunFolder, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.store.close()
    kept(run)
    note(run, 0, ("g", ["a", "b"]))
    assert main(["replay", *[str(run.path) if each == "RUN" else each for each in arguments]]) == 2
    told = capfd.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""


def test_a_store_alone_is_no_run(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.store.close()
    assert main(["replay", str(bench.folder), "--step", "0"]) == 2
    assert "has no config.json" in capfd.readouterr().err
