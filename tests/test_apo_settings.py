"""What a prompt search is told, and what is refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.algorithms.base import NotAttachedError
from tests.apo_parts import SEED, SMALL, TRAIN, VAL, search, wisher
from tests.scripted_model import ScriptedModel, wishes


def refused(apo: lr.APO[Any], tmp_path: Path, train: Any = ("t",), val: Any = ("v",), **trainer: Any) -> str:
    """What fit() says before anything is started."""
    with pytest.raises(lr.ConfigError) as error:
        lr.Trainer(algorithm=apo, runs_dir=tmp_path, **{"initial_resources": SEED, **trainer}).fit(
            wisher, train, val_dataset=val
        )
    assert not list(tmp_path.glob("run*"))
    return str(error.value)


def test_what_cannot_work_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    upstream = lr.Upstream(base_url="http://127.0.0.1:1/v1")
    claude = lr.Upstream(base_url="http://127.0.0.1:1", kind="anthropic")
    client: Any = object()
    assert "hold no PromptTemplate" in refused(lr.APO(client), tmp_path, initial_resources=None)
    only_llm = {"main_llm": lr.LLM(endpoint="http://x/v1", model="m")}
    assert "'main_llm': 'LLM'" in refused(lr.APO(client), tmp_path, initial_resources=only_llm)
    assert "val_dataset has no task" in refused(lr.APO(client), tmp_path, val=None)
    assert "train_dataset has no task" in refused(lr.APO(client), tmp_path, train=[])
    assert "needs a model that criticises" in refused(lr.APO(), tmp_path)
    assert "one only" in refused(lr.APO(client, optimizer="o"), tmp_path, relays={"o": upstream})
    assert "'o' is none of the Trainer's relays: ['p']" in refused(
        lr.APO(optimizer="o"), tmp_path, relays={"p": upstream}
    )
    assert "kind 'anthropic'" in refused(lr.APO(optimizer="o"), tmp_path, relays={"o": claude})
    broken = {"p": lr.PromptTemplate(template="{a} {")}
    assert "initial_resources['p']" in refused(lr.APO(client), tmp_path, initial_resources=broken)
    assert "cannot be read" in refused(lr.APO(client, gradient_prompt_files=[tmp_path / "none.txt"]), tmp_path)
    (tmp_path / "asks.txt").write_text("{{ template }} {{ weather }}")
    apo = lr.APO(client, apply_edit_prompt_files=[tmp_path / "asks.txt"])
    assert "uses weather, which there is not; there are critique, engine" in refused(apo, tmp_path)


@pytest.mark.parametrize(
    "name", ["beam_width", "branch_factor", "beam_rounds", "gradient_batch_size", "val_batch_size", "edit_attempts"]
)
def test_sizes_are_at_least_one(name: str) -> None:
    with pytest.raises(lr.ConfigError, match=f"algorithm.{name}=0: .*greater than or equal to 1"):
        lr.APO(object(), **{name: 0})


def test_names_are_those_of_0_3() -> None:
    client: Any = object()
    apo = lr.APO[dict[str, Any]](client, _poml_trace=True)
    assert apo.async_openai_client is client
    assert lr.APO(openai_client=client).async_openai_client is client
    assert lr.APO(async_openai_client=client) == lr.APO(client)
    theirs = {
        "gradient_model": "gpt-5-mini",
        "apply_edit_model": "gpt-4.1-mini",
        "diversity_temperature": 1.0,
        "gradient_batch_size": 4,
        "val_batch_size": 16,
        "beam_width": 4,
        "branch_factor": 4,
        "beam_rounds": 3,
        "rollout_batch_timeout": 3600.0,
        "run_initial_validation": True,
    }
    assert theirs.items() <= apo.settings().items()
    assert "async_openai_client" not in apo.settings()
    with pytest.raises(NotAttachedError, match="no best prompt yet"):
        apo.get_best_prompt()


async def test_overridden_settings_leave_the_result_with_the_users_own_algorithm(tmp_path: Path) -> None:
    from lightning_ray.launch import Launch, launched

    with ScriptedModel(wishes) as model:
        mine = lr.APO[str](model.client(), **SMALL)
        with launched(Launch(settings={"algorithm.beam_rounds": 2})):
            trainer = lr.Trainer(algorithm=mine, initial_resources=SEED)
        ran: Any = trainer.algorithm
        assert ran is not mine and (ran.beam_rounds, ran.beam_width) == (2, 2)
        await search(tmp_path, ran, TRAIN, VAL)
    assert mine.get_best_prompt() == ran.get_best_prompt() != SEED["prompt_template"]


async def test_without_a_run_the_same_is_refused() -> None:
    with pytest.raises(lr.ConfigError, match="no task"):
        await lr.APO[str](object()).run(["a"], [])
    with pytest.raises(lr.ConfigError, match="needs a model that criticises"):
        await lr.APO[str]().run(["a"], ["b"])
    with pytest.raises(lr.ConfigError, match="'o' is none of the Trainer's relays: there are none"):
        await lr.APO[str](optimizer="o").run(["a"], ["b"])
