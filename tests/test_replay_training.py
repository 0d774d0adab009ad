"""Replay with its training: a run of updates is written as a run writes it, and its steps are trained again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl")

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import Played
from lightning_ray.replay.trial import Request, Result, try_again
from lightning_ray.run.folder import RunFolder, write_json
from lightning_ray.run.state import ONLY
from lightning_ray.store import open_folder
from lightning_ray.trajectories.account import batch_of, settle
from lightning_ray.trajectories.episode import read_episodes
from tests.policy.oracle import load, token_logprobs, write_tiny_model
from tests.policy.ranks import shared_ranks
from tests.test_doctor import Bench
from tests.test_trajectories import model_call

STEPS = 4
SETTINGS: dict[str, Any] = {
    "group_size": 3,
    "prompts_per_step": 2,
    "steps": STEPS,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "schedule": "linear",
    "minibatch_rollouts": 4,
    "epochs": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "model"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def trier() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, as the command is."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def play(bench: Bench, model: Any, draw: np.random.Generator, step: int) -> dict[str, str]:
    """Two groups of three rollouts of two calls each, with logprobs near the initial model's."""
    group_of = {}
    for group in "hg":
        for index in range(3):
            first = draw.integers(0, 128, 5).tolist()
            sampled, between, last = (draw.integers(0, 128, size).tolist() for size in (6, 2, 4))
            calls = []
            for prompt, answer in ((first, sampled), (first + sampled + between, last)):
                exact = token_logprobs(model, prompt + answer)[-len(answer) :].detach().numpy()
                near = (exact + draw.normal(0, 0.2, len(answer))).astype(np.float32).tolist()
                versions = [step] * len(answer)
                calls.append(model_call("", prompt, answer) | {"logprobs": near, "weight_versions": versions})
            rollout_id = f"{step}{group}{index}"
            bench.rollout(rollout_id, *calls, reward=float(draw.integers(0, 3)) + index / 4, group=group)
            group_of[rollout_id] = f"{step}{group}"
    return group_of


def make_run(path: Path, model: Path, ranks: int, saved: tuple[int, ...], **settings: Any) -> Path:
    """A run's folder: config.json, store, steps.jsonl, metrics.jsonl, and checkpoints before the steps ``saved``."""
    folder = RunFolder(path)
    folder.create(resume=False)
    algorithm = GRPO(model=str(model), ranks=ranks, **{**SETTINGS, **settings})
    write_json(path / "config.json", {"algorithm": {"name": "GRPO", **algorithm.settings()}})
    bench, draw = Bench(folder.store), np.random.default_rng(5)
    groups = [play(bench, load(model), draw, step) for step in range(STEPS)]
    bench.store.close()
    view, trainers = open_folder(folder.store), shared_ranks().build(algorithm.update_settings(model), ranks)
    rows = []
    for step, group_of in enumerate(groups):
        if step in saved:
            writing = folder.begin_checkpoint(step)
            trainers.call("save", str(writing))
            folder.commit_checkpoint(writing, step, {})
        found = {rollout.rollout_id: rollout for rollout in view.query_rollouts()}
        last = {each: view.query_attempts(each).items[-1].attempt_id for each in group_of}
        episodes = read_episodes([found[each] for each in group_of], view.scan_spans(list(group_of)), last)
        account = settle(episodes, group_of, algorithm.batch, step)
        folder.append_step(Played(episodes, group_of, [], account).record(step, {ONLY: step}))
        figures = trainers.call("update", batch_of(account.trained, group_of), step)
        rows.append({"kind": "train", "step": step, **{f"update.{name}": value for name, value in figures.items()}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(path: Path, step: int, *changes: str) -> Request:
    return Request(path, path / "store", step, changes)


def answer(trier: ProcessPoolExecutor, request: Request) -> Result:
    return trier.submit(try_again, request).result(timeout=120)


def test_one_rank_replays_exactly_from_a_checkpoint_and_over_the_way(
    tmp_path: Path, model: Path, trier: ProcessPoolExecutor
) -> None:
    run = make_run(tmp_path / "run", model, 1, saved=(2,))
    for step, start in ((2, 2), (3, 2), (1, 0)):
        result = answer(trier, run_of(run, step))
        assert result.agrees and result.tolerance == 1e-6 and result.start.step == start
        lines = {line.name: line for line in result.lines}
        assert {"loss", "grad_norm", "clip_share", "approx_kl", "entropy", "max_logprob_diff"} <= lines.keys()
        assert all(line.difference == pytest.approx(0, abs=1e-6) for line in result.lines)
        assert 0 < lines["clip_share"].replayed < 1  # type: ignore[operator]


def test_other_settings_train_from_the_same_weights(tmp_path: Path, model: Path, trier: ProcessPoolExecutor) -> None:
    """What a run with the other settings in that one step would have had."""
    run = make_run(tmp_path / "run", model, 1, saved=(2,))
    result = answer(trier, run_of(run, 2, "algorithm.loss=gpg", "algorithm.learning_rate=0.1", "algorithm.epochs=1"))
    assert result.agrees
    lines = {line.name: line for line in result.lines}
    assert lines["loss"].changed != pytest.approx(lines["loss"].replayed, abs=1e-3)
    assert lines["max_logprob_diff"].changed == lines["max_logprob_diff"].replayed
    assert (lines["steps"].replayed, lines["steps"].changed) == (4, 2)
    left = {steps: (16 - 2 - (steps - 2)) / (16 - 2) for steps in (9, 11)}  # of 16 steps, two of which warm up
    assert lines["learning_rate"].replayed == pytest.approx(2e-3 * left[11])
    assert lines["learning_rate"].changed == pytest.approx(0.1 * left[9])
    same = answer(trier, run_of(run, 2, "algorithm.loss=vanilla"))
    assert all(line.difference == 0 for line in same.lines), "the same settings again, from a checkpoint of its own"


@pytest.mark.parametrize("lora", [{}, {"lora": {"rank": 4}}], ids=["whole", "lora"])
def test_two_ranks_replay_on_one(tmp_path: Path, model: Path, trier: ProcessPoolExecutor, lora: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", model, 2, saved=(2,), **lora)
    for step in (1, 2, 3):
        result = answer(trier, run_of(run, step))
        assert result.agrees and result.ranks == 2 and result.tolerance == 1e-4


def test_a_run_that_is_not_told_right_differs(tmp_path: Path, model: Path, trier: ProcessPoolExecutor) -> None:
    run = make_run(tmp_path / "run", model, 1, saved=())
    config = json.loads((run / "config.json").read_text())
    config["algorithm"]["learning_rate"] = 4e-3
    (run / "config.json").write_text(json.dumps(config))
    result = answer(trier, run_of(run, 2))
    assert not result.agrees and [*result.differing] == [0, 1, 2] and "learning_rate" in result.differing[0]
    assert answer(trier, replace(run_of(run, 2), tolerance=1e3)).agrees
