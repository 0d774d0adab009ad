"""How many rollouts does a prompt search need, and how much faster is it to play a round's candidates together?

    python -m benchmarks.apo            (about 8 minutes on 2 cores)
    python -m benchmarks.apo --quick    with half of the budget, and one speed-up (about 4 minutes)

The agent is simulated and the optimising models are scripted stand-ins: see ``benchmarks.apo_task``. Evaluations are
the rollouts, all of them counted, until the best prompt's score on test tasks, which no search sees, is within 0.05 of
the oracle's; a search that does not get there counts with its whole budget. Both searches are ``lr.APO`` with the same
settings over a real store and runner. The speed-up is the time of a round of 8 runners on Ray with rollouts that wait
for a second, one candidate at a time over all together. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning_ray as lr
from benchmarks.apo_task import SEED, StandIn, clerk, make_tasks, oracle, score
from benchmarks.report import show
from benchmarks.store import Goal, bar, circumstances
from tests.apo_parts import search
from tests.scripted_model import ScriptedModel, kind_of, part

GOALS = (Goal("evaluations_ratio", 0.5), Goal("apo_parallel_speedup", 3, least=True))
SEEDS = range(5)
WITHIN = 0.05
TRAIN, VAL, TEST = 40, 24, 100
SETTINGS: dict[str, Any] = {"beam_width": 2, "branch_factor": 2, "gradient_batch_size": 3, "val_batch_size": 12}
PROMPT: Any = {"prompt_template": lr.PromptTemplate(template=SEED)}


async def evaluations(seed: int, rounds: int, selection: str, reads: bool) -> tuple[int, float]:
    """Rollouts until the test score is near the oracle's (all, if it never is), and the test score at the end."""
    tasks = make_tasks(seed, TRAIN + VAL + TEST)
    train, val, test = tasks[:TRAIN], tasks[TRAIN : TRAIN + VAL], tasks[TRAIN + VAL :]
    goal = score(oracle(seed), test) - WITHIN
    with ScriptedModel(StandIn(seed, reads)) as model, tempfile.TemporaryDirectory() as folder:
        apo: Any = lr.APO(
            model.client(), beam_rounds=rounds, selection=selection, seed=seed, target_score=1.0, **SETTINGS
        )
        await search(Path(folder), apo, train, val, clerk, PROMPT, timeout=600)
    state = apo._outcome.state
    final = score(state.best_candidate.templates["prompt_template"].template, test)
    for one in state.history:
        if score(state.candidates[one.best].templates["prompt_template"].template, test) >= goal:
            return one.rollouts, final
    return state.rollouts, final


async def compare(rounds: int, progress: Any) -> dict[str, Any]:
    """Both stand-ins, and both selections, on all seeds."""
    figures: dict[str, Any] = {"seeds": len(SEEDS), "rounds_at_most": rounds}
    arms = {"apo": ("beam", True), "apo_pareto": ("pareto", True), "random": ("beam", False)}
    for name, (selection, reads) in arms.items():
        task = progress.add_task(name, total=len(SEEDS))
        found = []
        for seed in SEEDS:
            found.append(await evaluations(seed, rounds, selection, reads))
            progress.advance(task)
        figures[f"{name}_evaluations_median"] = round(statistics.median(count for count, _ in found))
        figures[f"{name}_evaluations"] = [count for count, _ in found]
        figures[f"{name}_test_scores"] = [round(final, 3) for _, final in found]
    figures["evaluations_ratio"] = round(figures["apo_evaluations_median"] / figures["random_evaluations_median"], 3)
    tasks = make_tasks(0, TRAIN + VAL + TEST)[TRAIN + VAL :]
    figures["score_of_seed_prompt"], figures["score_of_oracle"] = score(SEED, tasks), score(oracle(0), tasks)
    return figures


@lr.rollout
async def slow(task: int, prompt_template: lr.PromptTemplate) -> float:
    """Waits for a second, as for a model."""
    await asyncio.sleep(1.0)
    return len(prompt_template.template) % 7 / 7


def round_seconds(at_once: int | None, concurrency: int | None) -> float:
    """How long the first round takes on 8 runners: 4 parents with 2 edits each, batches of 2."""

    def longer(body: dict[str, Any]) -> str:
        if kind_of(body) == "critique":
            return "longer"
        return (
            f"<template>\n{part(body['messages'][0]['content'], 'instructions')}{'.' * len(model.bodies)}\n</template>"
        )

    with ScriptedModel(longer) as model, tempfile.TemporaryDirectory() as folder:
        apo: Any = lr.APO(
            model.client(),
            beam_rounds=1,
            beam_width=4,
            branch_factor=2,
            gradient_batch_size=2,
            val_batch_size=2,
            candidates_at_once=at_once,
        )
        lr.Trainer(algorithm=apo, n_runners=8, concurrency=concurrency, initial_resources=PROMPT, runs_dir=folder).fit(
            slow, [0, 1, 2, 3], val_dataset=[0, 1, 2, 3]
        )
    seconds: float = apo._outcome.state.history[0].seconds
    return seconds


def speedup(name: str, concurrency: int | None) -> dict[str, Any]:
    """One at a time over all together."""
    alone, together = round_seconds(1, concurrency), round_seconds(None, concurrency)
    return {name: round(alone / together, 2), f"{name}_seconds": [round(alone, 2), round(together, 2)]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="at most 30 rounds rather than 60; one speed-up")
    arguments.add_argument("--only", choices=("evaluations", "speedup"), help="the former need no Ray")
    given = arguments.parse_args()
    quick, figures = given.quick, dict[str, Any]()
    with contextlib.redirect_stdout(sys.stderr):
        if given.only != "speedup":
            with bar() as progress:
                figures |= asyncio.run(compare(30 if quick else 60, progress))
        if given.only != "evaluations":
            figures |= speedup("apo_parallel_speedup", None)
        if given.only != "evaluations" and not quick:
            figures |= speedup("apo_parallel_speedup_one_rollout_a_runner", 1)
    figures |= circumstances(quick) | {"optimizer": "scripted stand-in", "agent": "simulated"}
    show("prompt search, simulated", GOALS, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
