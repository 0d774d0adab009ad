"""Where figures go: each tracker by itself, their choice, and that none of them ends a run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.launch import Launch, launched
from lightning_ray.trackers import Tracker, Trackers
from lightning_ray.trackers.base import scalars
from lightning_ray.trackers.choice import PACKAGES, check_installed, check_trackers
from lightning_ray.trackers.jsonl import JsonlTracker
from lightning_ray.trackers.mlflow import MlflowTracker, dotted, legal
from lightning_ray.trackers.tensorboard import TensorBoardTracker
from lightning_ray.trackers.wandb import WandbTracker
from tests.fake_mlflow import SOURCE

STEP = {"kind": "train", "step": 4, "reward": 0.5, "swap_ms": 250.0, "validation": None, "rollouts": 8}
VALIDATION = {"kind": "val", "mode": "greedy", "step": 5, "reward": 0.75}
ALGORITHM = lr.GRPO(model="somewhere")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "sql"
    made.mkdir()
    (made / "config.json").write_text(
        json.dumps({"algorithm": {"name": "GRPO", "engine": {"port": 0}}, "n_runners": 2})
    )
    return made


class Kept:
    """A tracker of a user's own. ``fail`` says at what it raises."""

    def __init__(self, *fail: str) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.fail = fail
        self.closed = 0
        self.thread: threading.Thread | None = None

    def log(self, row: Mapping[str, Any]) -> None:
        self.thread = threading.current_thread()
        if "log" in self.fail:
            raise ConnectionError("no route")
        self.rows.append(row)

    def close(self) -> None:
        self.closed += 1
        if "close" in self.fail:
            raise ConnectionError("still no route")


# A row's numbers


def test_scalars_are_the_finite_numbers_by_kind_and_mode() -> None:
    row = {**VALIDATION, "failed": 0, "note": "text", "flag": True, "none": None, "nan": float("nan")}
    assert scalars(row) == {"val/greedy/reward": 0.75, "val/greedy/failed": 0.0}
    assert scalars(STEP) == {"train/reward": 0.5, "train/swap_ms": 250.0, "train/rollouts": 8.0}


def test_a_line_is_json_whatever_the_number(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({**STEP, "update.ratio_max": float("inf")})
    tracker.log(VALIDATION)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {**STEP, "update.ratio_max": None} and second == VALIDATION


def test_tensorboard_has_a_curve_for_each_figure(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path / "tensorboard")
    tracker.log({**STEP, "flag": True})
    tracker.log(VALIDATION)
    tracker.close()
    [events] = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"train/reward" in written and b"val/greedy/reward" in written and b"flag" not in written


# W&B and MLflow


def test_wandb_keeps_a_run_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WandbTracker(folder)
    tracker.log(STEP)
    tracker.log(VALIDATION)
    summary = dict(tracker._run.summary)
    config = dict(tracker._run.config)
    tracker.close()
    assert (summary["train/reward"], summary["val/greedy/reward"], summary["step"]) == (0.5, 0.75, 5)
    assert config["algorithm"]["name"] == "GRPO"
    [kept] = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert (folder / ".wandb-id").read_text() in kept.name and b"val/greedy/reward" in kept.read_bytes()
    assert wandb.run is None


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The real one with its files in a folder, otherwise the stand-in."""
    if importlib.util.find_spec("mlflow") is None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site/mlflow.py").write_text(SOURCE)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    yield importlib.import_module("mlflow")
    sys.modules.pop("mlflow")


def test_mlflow_has_settings_and_curves_and_goes_on_after_a_resume(folder: Path, mlflow: Any) -> None:
    tracker = MlflowTracker(folder)
    tracker.log({**STEP, "reward_by_agent.the (first)": 1.0})
    tracker.close()
    again = MlflowTracker(folder)
    again.log({**STEP, "step": 5, "reward": 0.6})
    client, run_id = mlflow.MlflowClient(), (folder / ".mlflow-id").read_text()
    assert client.get_run(run_id).info.status == "RUNNING"
    again.close()
    assert client.get_run(run_id).info.status == "FINISHED"
    points = client.get_metric_history(run_id, "train/reward")
    assert [(point.step, point.value) for point in points] == [(4, 0.5), (5, 0.6)]
    assert client.get_metric_history(run_id, "train/reward_by_agent.the _first_")


def test_settings_are_told_by_dotted_name() -> None:
    config = {"a": {"b": {"c": 1}, "d": {}}, "e": [1, 2]}
    assert dict(dotted(config)) == {"a.b.c": 1, "a.d": {}, "e": [1, 2]}
    assert legal("train/reward_by_agent.größe[1]") == "train/reward_by_agent.gr__e_1_"


# All of them


def test_all_get_each_row_and_are_closed_once(folder: Path) -> None:
    own, notes = Kept(), list[str]()
    trackers = Trackers(folder, notes.append, [own])
    trackers.log(STEP)
    trackers.log(VALIDATION)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    trackers.close()
    assert own.rows == [STEP, VALIDATION] and own.closed == 1 and notes == []
    assert own.thread is not threading.current_thread() and (folder / "tensorboard").is_dir()


def test_trackers_of_a_run_without_rows_are_never_opened(folder: Path) -> None:
    own, notes = Kept(), list[str]()
    Trackers(folder, notes.append, [own, "mlflow"]).close()
    assert own.closed == 0 and notes == [] and [file.name for file in folder.iterdir()] == ["config.json"]


def test_a_tracker_that_fails_is_told_once_and_gets_the_next_row(folder: Path) -> None:
    own, notes = Kept("log", "close"), list[str]()
    trackers = Trackers(folder, notes.append, [own])
    for step in range(3):
        trackers.log({**STEP, "step": step})
    trackers.close()
    assert notes == ["tracker Kept did not take train 0: ConnectionError: no route; the run goes on"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_cannot_be_opened_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, notes = list[Path](), list[str]()

    def refuse(self: Any, folder: Path) -> None:
        tried.append(folder)
        raise PermissionError("no key")

    monkeypatch.setattr(WandbTracker, "__init__", refuse)
    trackers = Trackers(folder, notes.append, ["wandb"])
    trackers.log(STEP)
    trackers.log(STEP)
    trackers.close()
    assert tried == [folder]
    assert notes == ["tracker wandb cannot be opened, and gets nothing: PermissionError: no key; the run goes on"]


def test_a_run_waits_neither_for_a_slow_tracker_nor_long_at_its_end(folder: Path) -> None:
    free, notes = threading.Event(), list[str]()

    class Slow(Kept):
        def log(self, row: Mapping[str, Any]) -> None:
            free.wait(30)

    began = time.monotonic()
    trackers = Trackers(folder, notes.append, [Slow()])
    trackers.log(STEP)
    trackers.close(seconds=0.05)
    free.set()
    assert time.monotonic() - began < 10 and "Slow did not take all" in notes[0]


# The choice


def test_a_trainer_has_the_trackers_that_are_chosen() -> None:
    own = Kept()
    assert isinstance(own, Tracker)
    made = lr.Trainer(algorithm=ALGORITHM, trackers=["wandb", own, "wandb"])
    assert made.trackers == ["wandb", own] and made.resolved()["trackers"] == ["wandb", "Kept"]
    assert "trackers" not in lr.Trainer(algorithm=ALGORITHM).resolved()


@pytest.mark.parametrize("value", ["wandb,mlflow", ["wandb", "mlflow"]])
def test_the_command_line_chooses_trackers(value: Any) -> None:
    with launched(Launch(settings={"trackers": value})):
        assert lr.Trainer(algorithm=ALGORITHM).trackers == ["wandb", "mlflow"]
    with launched(Launch(settings={"trackers": 5})), pytest.raises(lr.ConfigError, match="trackers=5: give names"):
        lr.Trainer(algorithm=ALGORITHM)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["wand"], r"there is no tracker 'wand'; did you mean 'wandb'\?"),
        (["xyz"], "known: wandb, mlflow"),
        ("wandb", r"give a list, \['wandb'\]"),
        ([Kept], "is no tracker; give an object with log"),
        ([5], "5 is no tracker"),
    ],
)
def test_what_is_no_tracker_is_refused(chosen: Any, message: str) -> None:
    with pytest.raises(lr.ConfigError, match=message):
        check_trackers(chosen)


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lr.ConfigError, match=r"'mlflow' needs the package .* pip install 'lightning-ray\[mlflow\]'"):
        check_installed([Kept(), "mlflow"])


def test_each_tracker_by_name_is_an_extra_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for name, package in PACKAGES.items():
        assert any(each.startswith(package) for each in project["optional-dependencies"][name])


def test_trackers_are_imported_only_when_asked_for() -> None:
    loaded = "import lightning_ray.trackers, sys; print([n for n in ('wandb', 'mlflow', 'ray') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
