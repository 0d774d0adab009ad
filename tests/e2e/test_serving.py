"""A checkpoint served for inference on real Ray Serve and vLLM: proved by its canaries, opened by its key alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny import make_tiny_model

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = [[3, 5, 6, 7], [4, 8, 9]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that serves the model and asks it, with and without the key, tells of it."""
    from lightning_ray.policy.loaded import write_canaries

    model = tmp_path_factory.mktemp("model")
    make_tiny_model(model)
    (model / "trainer_state").mkdir()
    write_canaries(model, PROMPTS, logprobs_of(model))
    command = [sys.executable, "-m", "tests.e2e.serve_model", str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray writes there too
    told: dict[str, Any] = json.loads(line)
    return told


def logprobs_of(model: Path) -> list[list[float]]:
    """What the trainer's side computes."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for ids in PROMPTS:
        with torch.no_grad():
            rows = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([float(rows[place, token]) for place, token in enumerate(ids[1:])])
    return found


def test_it_answers_openai_s_and_anthropic_s_clients(served: dict[str, Any]) -> None:
    assert served["models"] == ["tiny"]
    assert served["chat"] == 4 and served["messages"] == 4, "tokens sampled"


def test_without_the_key_there_is_nothing_but_health(served: dict[str, Any]) -> None:
    assert served["without_key"] == {"/v1/models": 401, "/tokenize": 401, "/metrics": 401, "/health": 200}


def test_an_engine_that_hangs_is_started_anew(served: dict[str, Any]) -> None:
    assert served["after_a_stall"] == 3, "tokens sampled"
