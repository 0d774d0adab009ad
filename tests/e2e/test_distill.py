"""On-policy distillation from a vLLM of its own: the policy's divergence from the teacher falls, without any reward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cluster import Cluster
from lightning_ray.config import RunnerSettings
from lightning_ray.conversations.rendering import load_tokenizer
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from lightning_ray.teacher import Teacher
from tests.e2e.tiny import make_tiny_model
from tests.e2e.wire.reference import Reference
from tests.policy.oracle import load, token_logprobs

pytestmark = pytest.mark.e2e
ENGINE = lr.EngineSettings(max_model_len=128, kv_cache_memory_mb=16)
TASKS = [{"question": f"w{i % 12} w{i % 7}"} for i in range(24)]


@lr.rollout
async def talks(task: dict[str, Any], llm: lr.LLM) -> None:
    """Says something, and emits no reward."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    await client.chat.completions.create(model=llm.model, messages=messages, max_tokens=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and teacher: the same tokenizer, other weights."""
    policy, teacher = (tmp_path_factory.mktemp("models") / name for name in ("policy", "teacher"))
    make_tiny_model(policy, seed=0)
    make_tiny_model(teacher, seed=1)
    return policy, teacher


@pytest.fixture(scope="module")
def teacher(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[lr.Upstream]:
    """vLLM's own server."""
    reference = Reference(folders[1], "large", ENGINE, tmp_path_factory.mktemp("vllm") / "log")
    try:
        reference.wait()
        yield lr.Upstream(base_url=f"{reference.root}/v1", model="large")
    finally:
        reference.stop()


def test_vllm_tells_the_logprobs_of_a_prompt_and_its_tokenizer(
    folders: tuple[Path, Path], teacher: lr.Upstream, tmp_path: Path
) -> None:
    asked = Teacher(teacher)
    sequences = [[1, 3, 5, 6, 2, 1, 4, 9, 2], [1, 3, 7, 2]]
    oracle = load(folders[1])
    for told, ids in zip(asked.logprobs(sequences), sequences, strict=True):
        expected = token_logprobs(oracle, ids).detach().numpy()
        assert told[0] == 0 and told[1:] == pytest.approx(expected, abs=1e-4) and told.dtype == np.float32
    tokenizer = load_tokenizer(folders[0])
    asked.check_tokenizer(tokenizer)
    with pytest.raises(lr.ConfigError, match="refuses 200 token ids to score: 400"):
        asked.logprobs([[5] * 200])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = state["model"]["vocab"]
    ids["w1"], ids["w2"] = ids["w2"], ids["w1"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    for name in ("tokenizer_config.json",):
        (tmp_path / name).write_text((folders[0] / name).read_text())
    with pytest.raises(lr.ConfigError, match="teacher 'large' has another tokenizer than the policy"):
        asked.check_tokenizer(load_tokenizer(tmp_path))
    asked.close()


async def test_the_divergence_from_the_teacher_falls(
    folders: tuple[Path, Path], teacher: lr.Upstream, tmp_path: Path
) -> None:
    algorithm = lr.Distill(
        model=folders[0],
        teacher=teacher,
        steps=10,
        prompts_per_step=24,
        group_size=2,
        ranks=1,
        learning_rate=3e-3,
        warmup_steps=0,
        minibatch_rollouts=24,
        checkpoint_every=10,
        engine=ENGINE,
    )
    folder = RunFolder(tmp_path / "distill")
    folder.create(resume=False)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=64)
    run = Run(folder, Reporter(Console(quiet=True)), Cluster(), talks, {"train": TASKS}, runners, False)
    try:
        algorithm.check(run)
        await TrainingLoop(algorithm, run).learn()
    finally:
        await run.close()
    rows = [row for row in folder.metrics() if row["kind"] == "train"]
    apart = [row["update.teacher_kl"] for row in rows]
    assert np.mean(apart[-4:]) < 0.85 * apart[0], apart
    assert all(row["rollouts_trained"] == 48 and row["time.teacher"] > 0 for row in rows)
    # What the run told is so: the divergence over the whole vocabulary, at places that a conversation comes to.
    before, after = (divergence(each, folders[1]) for each in (folders[0], folder.latest_checkpoint()))
    assert after < 0.6 * before, (before, after)
    config = json.loads((tmp_path / "distill" / "summary.json").read_text())
    assert config["rollouts_trained"] == 480 and config["swaps"] == config["swaps_proved"] == 11


def divergence(policy: Path | None, teacher: Path) -> float:
    """KL(policy | teacher) of the first token of an answer, the mean over the tasks."""
    import torch

    assert policy is not None
    tokenizer, models = load_tokenizer(teacher), [load(policy), load(teacher)]
    found = []
    for task in TASKS:
        messages = [{"role": "user", "content": task["question"]}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in models)
        found.append(float((ours.exp() * (ours - theirs)).sum()))
    return float(np.mean(found))
