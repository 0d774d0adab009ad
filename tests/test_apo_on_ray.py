"""A script of Agent Lightning 0.3's APO, with another import line, as a run on Ray. The model is scripted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_ray import APO, PromptTemplate, TraceToMessages, Trainer, rollout
from tests.scripted_model import ScriptedModel, wishes
from tests.test_apo import TRAIN, VAL


@rollout
def agent(task: str, prompt_template: PromptTemplate) -> float:
    from lightning_ray import emit_message

    said = prompt_template.format(task="")
    for word in task.split():
        if word not in said:
            emit_message(f"wanted: {word}")
    return sum(word in said for word in task.split()) / len(task.split())


def test_a_script_of_0_3_runs(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        algo = APO[str](
            model.client(),
            val_batch_size=4,
            gradient_batch_size=2,
            beam_width=2,
            branch_factor=2,
            beam_rounds=3,
            _poml_trace=True,
        )
        trainer = Trainer(
            algorithm=algo,
            n_runners=2,
            initial_resources={"prompt_template": PromptTemplate(template="Do {task}", engine="f-string")},
            adapter=TraceToMessages(),
            runs_dir=tmp_path,
        )
        summary: dict[str, Any] = trainer.fit(agent=agent, train_dataset=TRAIN, val_dataset=VAL)
    best = algo.get_best_prompt()
    assert isinstance(best, PromptTemplate) and "{task}" in best.template and best.template != "Do {task}"
    assert summary["score_before"] == 0.0 and summary["score_after"] > 0.5 and summary["rounds"] == 3
    assert summary["rollouts"] == summary["rollouts_scored"] and summary["rollouts_masked"] == 0
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text())["algorithm"]["beam_width"] == 2
    assert (folder / "report.html").is_file() and (folder / "best/prompt_template.txt").read_text() == best.template
