"""A prompt search whose optimising model stands behind the run's relay: counted, capped, and resumed.

Real Ray, Serve and relay; the model is scripted, over real HTTP.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.cli import main
from lightning_ray.launch import Launch, launched
from lightning_ray.store import open_folder
from tests.apo_parts import SEED
from tests.scripted_model import ScriptedModel, kind_of, part, wishes
from tests.test_apo import SMALL, TRAIN, VAL
from tests.test_apo_on_ray import agent

pytestmark = pytest.mark.e2e
KEY = "sk-optimizer-0123456789"
COST = 100 * 2.0 / 1e6 + 20 * 10.0 / 1e6
"""Of a call: 100 tokens in, 20 out."""


def fit(model: ScriptedModel, runs_dir: Path, calls: int, resume: bool = False) -> dict[str, Any]:
    upstream = lr.Upstream(
        base_url=model.url,
        api_key=KEY,  # type: ignore[arg-type]
        model="big-model",
        price_input_per_million=2.0,
        price_output_per_million=10.0,
        max_spend=calls * COST - COST / 2,
        retries=0,
    )
    with launched(Launch(resume=resume)):
        trainer = lr.Trainer(
            algorithm=lr.APO(optimizer="optimizer", beam_rounds=5, optimizer_calls_at_once=1, **SMALL),
            relays={"optimizer": upstream},
            initial_resources=SEED,
            n_runners=1,
            runs_dir=runs_dir,
        )
    return trainer.fit(agent, TRAIN, val_dataset=VAL)


def test_the_spend_is_capped_and_the_run_goes_on_under_a_higher_cap(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        capped = fit(model, tmp_path, calls=12)
        assert len(model.bodies) == 12 and {body["model"] for body in model.bodies} == {"big-model"}
        assert model.keys == {f"Bearer {KEY}"}
        resumed = fit(model, tmp_path, calls=10_000, resume=True)
        asked = len(model.bodies)
    assert "may cost no more" in capped["stopped"] and "max_spend" in capped["stopped"]
    assert 0 < capped["rounds"] < 5 and capped["score_after"] > capped["score_before"] == 0.0
    assert capped["optimizer"]["calls"] == 12 and capped["optimizer"]["money"] == pytest.approx(12 * COST)

    assert resumed["rounds"] == 5 and resumed["stopped"] is None
    assert resumed["score_after"] >= capped["score_after"]
    assert resumed["optimizer"]["calls"] == asked and resumed["optimizer"]["money"] == pytest.approx(asked * COST)
    folder = tmp_path / "run"
    assert [row["step"] for row in map(json.loads, (folder / "metrics.jsonl").open())] == [1, 2, 3, 4, 5]
    store = open_folder(folder / "store")
    searches = [each for each in store.query_rollouts() if "optimizer" in (each.metadata or {})]
    assert [each.status for each in searches] == ["succeeded", "succeeded"]
    calls = store.scan_spans([each.rollout_id for each in searches])
    assert calls["status"].to_pylist().count("OK") == asked
    seed = store.get_resources_by_id("v0")
    assert seed is not None and set(seed.resources) == {"prompt_template"}, "agents do not get the optimizer"


RULES = {
    "Who wants to leave: account.": ("account", r"cancel|stop my|end our|no longer"),
    "What an update broke: engineering.": ("engineering", r"update|version"),
    "Anything with a lawyer: lead.": ("lead", r"lawyer|attorney|counsel"),
}


def sorting(body: dict[str, Any]) -> str:
    """The agent's model, which sorts by what it is told and by a few words of its own, and the optimizer."""
    question = body["messages"][0]["content"]
    if body["model"] == "gpt-4.1-mini":
        missing = [rule for rule, (team, _) in RULES.items() if f"the right team was {team}" in question]
        if kind_of(body) == "critique":
            return "\n".join(rule for rule in missing if rule not in part(question, "instructions")) or "nothing"
        told = [rule for rule in RULES if rule in part(question, "review")]
        return f"<template>\n{' '.join(told)}\n{part(question, 'instructions')}\n</template>"
    rules, _, ticket = question.rpartition("\n\n")
    for rule, (team, words) in RULES.items():
        if rule in rules and re.search(words, ticket):
            return team
    return "billing" if re.search("payment|invoice|bill|refund|charged", ticket) else "support"


def test_the_example_finds_the_habits_of_the_firm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedModel(sorting) as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert main(["train", "examples/prompts", "--runs-dir", str(tmp_path), "--set", "algorithm.beam_width=1"]) == 0
    summary = json.loads((tmp_path / "prompts/summary.json").read_text())
    assert summary["score_before"] < 0.5 and summary["score_after"] == 1.0
    assert summary["stopped"] == "target_score=1 is reached"
    best = (tmp_path / "prompts/best/prompt_template.txt").read_text()
    assert all(rule in best for rule in RULES) and "{ticket}" in best
