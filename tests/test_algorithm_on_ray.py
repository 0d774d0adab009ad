"""An algorithm of one's own in a run: over the run's store, with runners on Ray."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.cli import main
from lightning_ray.store import open_folder

PROMPT: Any = {"prompt": lr.PromptTemplate(template="Say {word}")}


@lr.rollout
async def echo(task: str, prompt_template: lr.PromptTemplate) -> float:
    return len(prompt_template.format(word=task))


class Search(lr.Algorithm):
    """Tries two prompts and keeps the one with the higher reward."""

    def __init__(self) -> None:
        self.best: tuple[float, str] = (-1.0, "")

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        first = (self.get_initial_resources() or {})["prompt"]
        for template in (first.template, "Say it aloud: {word}"):
            update = await store.add_resources({"prompt": lr.PromptTemplate(template=template)})
            rollouts = [
                await store.enqueue_rollout(train_dataset[index], "train", update.resources_id)
                for index in range(len(train_dataset))
            ]
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in rollouts], timeout=60)
            rewards = [
                lr.find_final_reward((await store.query_spans(rollout.rollout_id)).items) for rollout in rollouts
            ]
            self.best = max(self.best, (sum(reward or 0.0 for reward in rewards), template))


def test_an_algorithm_over_the_store_learns_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = Search()
    trainer = lr.Trainer(
        algorithm=search, initial_resources=PROMPT, n_runners=1, name="search", runs_dir=tmp_path, concurrency=4
    )
    mine = subprocess.Popen(["sleep", "600"])
    try:
        summary = trainer.fit(echo, ["a", "bc"])
        assert mine.poll() is None, "what the script started itself is not the run's to end"
    finally:
        mine.kill()
        mine.wait()
    assert search.best == (float(len("Say it aloud: a") + len("Say it aloud: bc")), "Say it aloud: {word}")
    assert summary["rollouts_by_status"] == {"succeeded": 4}
    folder = tmp_path / "search"
    assert json.loads((folder / "config.json").read_text())["algorithm"] == {"name": "Search"}
    assert len(open_folder(folder / "store").query_rollouts()) == 4
    assert main(["doctor", str(folder)]) == 0 and "no_model_call" in capsys.readouterr().out


def test_the_baseline_tells_the_mean_reward_of_a_run(tmp_path: Path) -> None:
    @lr.rollout
    async def picky(task: str, prompt_template: lr.PromptTemplate) -> float:
        if not task:
            raise ValueError("an empty word")
        return float(len(prompt_template.format(word=task)) > 5)

    baseline = lr.Baseline(polling_interval=0.2)
    trainer = lr.Trainer(algorithm=baseline, initial_resources=PROMPT, n_runners=1, runs_dir=tmp_path, name="baseline")
    summary = trainer.fit(picky, ["a", "bc", "de", ""], val_dataset=["fgh"])
    assert summary["train"]["reward"] == pytest.approx(2 / 3) and summary["train"]["failures"] == {"agent_failed": 1}
    assert 0 <= summary["train"]["low"] < 0.5 and summary["train"]["high"] <= 1
    assert (summary["val"]["reward"], summary["val"]["rollouts"]) == (1.0, 1)
    assert summary["rollouts_by_status"] == {"succeeded": 4, "failed": 1}
    assert json.loads((tmp_path / "baseline/summary.json").read_text()) == summary

    @lr.rollout
    async def asking(task: str, llm: lr.LLM) -> float:
        return 1.0

    with pytest.raises(lr.ConfigError, match="has a parameter 'llm', and there is no LLM"):
        trainer.fit(asking, ["a"])


def test_a_failing_algorithm_ends_the_run_with_its_error(tmp_path: Path) -> None:
    @lr.algo
    def broken(train_dataset: Any) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        lr.Trainer(algorithm=broken, n_runners=1, runs_dir=tmp_path).fit(echo, ["a"])
