"""``lightning-ray eval`` of a run, a folder and an endpoint, on real Ray, Serve and vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

import lightning_ray as lr
from lightning_ray.store import open_folder
from tests.e2e.tiny import make_tiny_model
from tests.relay_parts import COST, PRICES
from tests.relay_upstream import KEY, FakeUpstream, listening

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = """
import lightning_ray as lr
from tests.e2e.tiny import make_tiny_model, one_word

tasks = [{"question": f"w{i % 12} w{i % 5}", "tag": "odd" if i % 2 else "even"} for i in range(12)]
algorithm = lr.GRPO(
    model=make_tiny_model,
    steps=6,
    prompts_per_step=8,
    group_size=8,
    ranks=1,
    learning_rate=2e-2,
    warmup_steps=1,
    validate_every=2,
    checkpoint_every=2,
    rollout_timeout_seconds=30,
    engine=lr.EngineSettings(max_model_len=64, kv_cache_memory_mb=16),
)
lr.Trainer(algorithm=algorithm, n_runners=1, name="tiny").fit(one_word, train_dataset=tasks, val_dataset=tasks)
print("the script went on")
"""


def lightning_ray(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_ray.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def told(folder: Path, *arguments: str) -> Any:
    return json.loads(lightning_ray(folder, "eval", *arguments, "--json").stdout)


def test_a_run_against_the_model_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    lightning_ray(tmp_path, "train", "train.py")
    run = tmp_path / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())

    found = told(
        tmp_path, "train.py", "--run", "tiny", "--against", "tiny@initial", "--samples", "4",
        "--set", "evaluation.price_output_per_million=1e6",
    )  # fmt: skip
    after, before = found["reports"]
    assert "the script went on" not in json.dumps(found)
    version = summary["swaps"] - 1
    assert after["subject"]["proof"]["max_logprob_diff"] < 1e-4 and after["subject"]["weight_version"] == version > 0
    assert before["subject"]["proof"] == {"by": "the engine's loading of the folder"}
    for report in (after, before):
        figures, spend = report["figures"], report["figures"]["spend"]["policy"]
        assert (figures["tasks"], figures["rollouts"], figures["failed"]) == (12, 48, 0)
        assert report["sampling"] == "sampled" and {*figures["pass_at"]} == {"1", "2", "4"}
        assert spend["calls"] == spend["completion_tokens"] == spend["money"] == 48 and figures["turns"] == 1
        assert figures["low"] < figures["reward"] < figures["high"] or figures["reward"] in (0, 1)
        assert {*figures["tags"]} == {"even", "odd"}
    assert after["figures"]["reward"] == pytest.approx(summary["val"]["sampled_after"], abs=0.25)
    [reward, *tags] = found["comparison"]["lines"]
    assert reward["paired"]["difference"] > 0.3 and reward["paired"]["p"] < 0.01 and reward["paired"]["tasks"] == 12
    assert [line["name"] for line in tags] == ["reward, even", "reward, odd"]

    folder = Path(after["folder"])
    assert folder == run.with_name("tiny-eval")
    spans = open_folder(folder / "store").table()
    sampled = spans.filter(spans["prompt_ids"].is_valid())
    assert {each for versions in sampled["weight_versions"].to_pylist() for each in versions} == {version}
    assert "48 rollouts" in lightning_ray(tmp_path, "doctor", str(folder)).stdout
    shown = lightning_ray(tmp_path, "eval", str(folder), "--against", str(before["folder"])).stdout
    assert "A - B" in shown and "pass@4" in shown


class Judged(lr.LitAgent[Any]):
    """Asks the endpoint that is evaluated; tells its key if it can see it."""

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        llm = resources["main_llm"]
        base = llm.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id)
        if KEY in repr((resources, dict(os.environ))):
            raise AssertionError("the key is the relay's")
        client = AsyncOpenAI(base_url=base, api_key=llm.api_key, max_retries=0)
        messages: Any = [{"role": "user", "content": task["say"]}]
        answer = await client.chat.completions.create(model=llm.model, messages=messages, temperature=0.5)
        if task["say"] == "stumble":
            raise ValueError("the agent's own fault")
        return float((answer.choices[0].message.content or "").endswith("yes"))


@contextmanager
def served(fake: FakeUpstream) -> Iterator[str]:
    """The upstream, in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = listening(fake.app())
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(20)
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


def test_an_endpoint_without_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    fake = FakeUpstream()
    tasks = [{"say": word, "tags": [word]} for word in ("yes", "no", "stumble", "yes")]
    with served(fake) as address:
        upstream = lr.Upstream(base_url=f"{address}/v1", model="big", api_key_env="JUDGE_KEY", **PRICES)  # type: ignore[arg-type]
        trainer = lr.Trainer(n_runners=1, runs_dir=tmp_path, name="judged")
        settings = lr.EvaluationSettings(samples=2, sampling="greedy")
        found = trainer.validate(Judged(), tasks, of=upstream, settings=settings)
    figures = found.figures
    assert (figures.tasks, figures.rollouts, figures.failures) == (4, 8, {"agent_failed": 2})
    assert figures.reward == pytest.approx(2 / 3) and figures.tags["yes"].reward.value == 1.0
    assert figures.pass_at["2"].value == pytest.approx(2 / 3) and figures.turns == 1
    spend = figures.spend["evaluated"]
    assert (spend.calls, spend.prompt_tokens, spend.completion_tokens) == (8, 800, 160)
    assert spend.money == pytest.approx(8 * COST)
    assert all(body["temperature"] == 0 and body["model"] == "big" for _, _, body in fake.requests)
    assert found.folder == tmp_path / "judged-eval" and KEY not in (found.folder / "eval.json").read_text()
    assert lr.compare(found, found.folder).reward.p == 1.0


class Pair(lr.LitAgent[Any]):
    """Two policies say a word each."""

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        for name in ("writer", "editor"):
            llm = resources[name]
            base = llm.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id)
            messages: Any = [{"role": "user", "content": task["say"]}]
            async with AsyncOpenAI(base_url=base, api_key=llm.api_key) as client:
                await client.chat.completions.create(model=llm.model, messages=messages, max_tokens=1)
        return 1.0


def test_two_policies_one_of_them_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    make_tiny_model(tmp_path / "base")
    make_tiny_model(tmp_path / "two" / "writer", seed=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "two" / "editor")
    policies = {
        "writer": lr.Policy(model=tmp_path / "base"),
        "editor": lr.Policy(model=tmp_path / "base", lora={"rank": 4}),  # type: ignore[arg-type]
    }
    engine = lr.EngineSettings(max_model_len=64, kv_cache_memory_mb=16)
    trainer = lr.Trainer(
        algorithm=lr.GRPO(policies=policies, engine=engine), n_runners=1, runs_dir=tmp_path, name="two"
    )
    found = trainer.validate(Pair(), [{"say": "w1"}, {"say": "w2"}], of=tmp_path / "two")
    assert found.figures.turns == 2 and found.figures.failed == 0
    assert {name: spend.calls for name, spend in found.figures.spend.items()} == {"writer": 2, "editor": 2}
    assert {*found.subject["proof"]} == {"writer", "editor"} == {*found.subject["models"]}


def test_weights_that_are_not_the_checkpoints_are_not_served(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from lightning_ray.policy.loaded import write_canaries
    from lightning_ray.policy.model_folder import STATE, vocabulary_of
    from lightning_ray.policy.proof import canary_prompts

    make_tiny_model(tmp_path / "model")
    (tmp_path / "model" / STATE).mkdir()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompts = canary_prompts(vocabulary_of(tmp_path / "model"))
    with torch.no_grad():
        scores = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in prompts]
    expected = [[float(row[i, t]) for i, t in enumerate(ids[1:])] for row, ids in zip(scores, prompts, strict=True)]
    write_canaries(tmp_path / "model", prompts, expected)
    (tmp_path / "train.py").write_text(SCRIPT)
    found = told(tmp_path, "train.py", "--model", "model", "--tasks", "2", "--name", "mine")
    assert found["sampling"] == "greedy" and found["figures"]["rollouts"] == 2 and Path(found["folder"]).name == "mine"
    assert found["subject"]["proof"]["max_logprob_diff"] < 1e-4, "what transformers computes, vLLM does"

    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, file, {"format": "pt"})
    refused = lightning_ray(tmp_path, "eval", "train.py", "--model", "model", "--tasks", "2", code=1)
    assert "it does not serve these weights" in refused.stderr and "Traceback" not in refused.stderr
