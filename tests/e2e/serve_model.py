"""Serves a model as ``serve run deployments.serving:app`` does, asks it, and prints what came of it as JSON.

A process of its own, whose environment has the key before Ray starts.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import anthropic
import httpx
import openai
from ray import serve

from deployments.serving import KEY_VARIABLE, ServingSettings, app
from lightning_ray.net import free_port
from lightning_ray.own_ray import OwnRay

KEY = "a key of the test"
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
    engine = {"max_model_len": 128, "kv_cache_memory_mb": 16}
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
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
