"""Serves a model as ``serve run deployments.serving:app`` does, asks it, and prints what came of it as JSON.

A process of its own, whose environment has the key before Ray starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import anthropic
import httpx
import openai
import psutil
from ray import serve

from deployments.serving import KEY_VARIABLE, ServingSettings, app
from lightning_ray.net import free_port
from lightning_ray.own_ray import OwnRay

KEY = "a key of the test"
STALL_SECONDS = 300.0
HELLO = [{"role": "user", "content": "w1 w2"}]


def main(model: str) -> None:
    os.environ[KEY_VARIABLE] = KEY
    own = OwnRay.start(lambda _: {}, {"num_cpus": 8, "log_to_driver": False})
    try:
        print(json.dumps(asked(model)))
    finally:
        serve.shutdown()
        own.end()


def asked(model: str) -> dict[str, Any]:
    """What clients hear from the model, served."""
    port = free_port("127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    engine = {"max_model_len": 128, "kv_cache_memory_mb": 16, "process": "own", "stall_seconds": 5}
    serve.run(app(ServingSettings.model_validate({"model": model, "name": "tiny", "engine": engine})))
    address = f"http://127.0.0.1:{port}"
    openai_client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY)
    chat = openai_client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=4,
        extra_body={"ignore_eos": True},  # type: ignore[arg-type]
    )
    anthropic_client = anthropic.Anthropic(base_url=address, api_key=KEY)
    message = anthropic_client.messages.create(
        model="tiny",
        messages=HELLO,
        max_tokens=4,
        extra_body={"ignore_eos": True},  # type: ignore[arg-type]
    )
    return {
        "models": [known.id for known in openai_client.models.list()],
        "chat": chat.usage.completion_tokens if chat.usage else None,
        "messages": message.usage.output_tokens,
        "without_key": {
            path: httpx.get(f"{address}{path}").status_code
            for path in ("/v1/models", "/tokenize", "/metrics", "/health")
        },
        "after_a_stall": after_a_stall(openai_client),
    }


def after_a_stall(client: openai.OpenAI) -> int:
    """How many tokens are sampled by a call to an engine that hangs, which its client makes again and again."""
    [engine] = [each for each in psutil.Process().children(recursive=True) if is_engine(each)]
    engine.suspend()
    impatient = client.with_options(timeout=20, max_retries=0)
    deadline = time.monotonic() + STALL_SECONDS
    while True:
        try:
            answer = impatient.completions.create(
                model="tiny", prompt="w1", max_tokens=3, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            return answer.usage.completion_tokens
        except openai.APIError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def is_engine(process: psutil.Process) -> bool:
    """Whether it is vLLM's."""
    try:
        return "EngineCore" in process.name()
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
