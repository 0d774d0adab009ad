"""What is served for inference: which model, whose key opens it, and that its weights are vouched for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deployments.serving import KEY_VARIABLE, KeyGuard, ServingSettings, app, find_key, prove
from lightning_ray.errors import ConfigError, SwapError
from lightning_ray.policy.loaded import loaded_from, write_canaries

KEY = "0123456789abcdef"


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.mark.parametrize(
    "path, headers, status",
    [
        ("/v1/models", {"authorization": f"Bearer {KEY}"}, 200),
        ("/v1/messages", {"x-api-key": KEY}, 200),
        ("/health", {}, 200),
        ("/v1/models", {}, 401),
        ("/tokenize", {}, 401),
        ("/metrics", {"authorization": "Bearer "}, 401),
        ("/v1/models", {"authorization": f"Bearer {KEY}0"}, 401),
        ("/health/../v1/models", {}, 401),
    ],
)
async def test_the_key_opens_all_and_nothing_else_does(path: str, headers: dict[str, str], status: int) -> None:
    transport = httpx.ASGITransport(KeyGuard(echo, KEY))
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        answer = await client.get(path, headers=headers)
    assert answer.status_code == status
    assert status == 200 or KEY_VARIABLE in answer.json()["error"]["message"]


def test_a_key_comes_from_the_environment_or_a_file_and_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        find_key(file)
    file.write_text(f"{KEY}\n")
    assert find_key(file) == KEY
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match="16 characters"):
        find_key(file)


def test_a_run_s_checkpoint_or_a_model_s_folder_is_served(tmp_path: Path) -> None:
    model_in(tmp_path / "run" / "checkpoints" / "step-000004")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000004")
    for named in (str(model_in(tmp_path / "model")), f"{tmp_path}/run@4"):
        assert app(ServingSettings(model=named))._bound_deployment.init_args[0].model == named
    with pytest.raises(ConfigError, match="there is no such checkpoint"):
        app(ServingSettings(model=f"{tmp_path}/run@5"))
    with pytest.raises(ConfigError, match="no folder of a run and no folder of a model"):
        app(ServingSettings(model=str(tmp_path / "elsewhere")))
    with pytest.raises(ConfigError, match=r"policy='writer'.*name one of them"):
        app(ServingSettings(model=str(tmp_path / "model"), policy="writer"))


@pytest.mark.parametrize("told, agrees", [(-0.5, True), (-0.51, False)])
async def test_weights_that_compute_otherwise_are_not_served(tmp_path: Path, told: float, agrees: bool) -> None:
    folder = model_in(tmp_path / "model")
    (folder / "trainer_state").mkdir()
    write_canaries(folder, [[1, 2, 3]], [[told, told]])

    async def generate(prompt: Any, asked: Any, request_id: str) -> Any:
        ids = prompt["prompt_token_ids"]
        yield SimpleNamespace(prompt_logprobs=[None, *({token: SimpleNamespace(logprob=-0.5)} for token in ids[1:])])

    proving = prove(SimpleNamespace(generate=generate), folder, loaded_from(folder, 4, 1e-4))
    if agrees:
        await proving
    else:
        with pytest.raises(SwapError, match=r"1\.00e-02.*does not serve"):
            await proving


def test_arguments_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="modle"):
        ServingSettings(**json.loads('{"model": "m", "modle": "n"}'))
