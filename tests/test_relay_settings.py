"""How a Trainer and the deployment are told of upstreams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from deployments.relay import SECRET_VARIABLE, find_secret, read_upstreams
from lightning_ray.cluster import Cluster
from lightning_ray.errors import ConfigError
from lightning_ray.launch import Launch, launched
from lightning_ray.machine import environment

KEY = "sk-upstream-0123456789abcdef"
HERE = "http://127.0.0.1:1/v1"


def test_a_trainer_keeps_its_relays_without_their_keys() -> None:
    trainer = lr.Trainer(relays={"judge": lr.Upstream(base_url=HERE, api_key=KEY, model="large")})  # type: ignore[arg-type]
    shown = trainer.resolved()["relays"]["judge"]
    assert shown["model"] == "large" and shown["base_url"] == HERE and KEY not in repr(shown)
    with pytest.raises(ConfigError, match="relay 'main_llm'"):
        lr.Trainer(relays={"main_llm": lr.Upstream(base_url=HERE)})


def test_the_command_line_reaches_them() -> None:
    settings: dict[str, Any] = {"relays.judge.model": "small", "relays.judge.max_concurrent": 3}
    with launched(Launch(settings=settings)):
        trainer = lr.Trainer(relays={"judge": lr.Upstream(base_url=HERE, api_key=KEY)})  # type: ignore[arg-type]
    judge = trainer.relays["judge"]
    assert (judge.model, judge.max_concurrent, judge.own_headers()) == ("small", 3, {"authorization": f"Bearer {KEY}"})
    for key, reason in (("relays.judge.modell", "did you mean 'model'"), ("relays.jugde.model", "no such setting")):
        with pytest.raises(ConfigError, match=reason), launched(Launch(settings={key: "x"})):
            lr.Trainer(relays={"judge": lr.Upstream(base_url=HERE)})


def test_dev_needs_another_model_in_its_place() -> None:
    @lr.rollout
    def agent(task: int, llm: lr.LLM) -> float:
        return 1.0

    trainer = lr.Trainer(relays={"judge": lr.Upstream(base_url=HERE)})
    with pytest.raises(ConfigError, match=r"dev\(\) starts no relay: give an lr.LLM for judge"):
        trainer.dev(agent, [1])


def test_keys_are_hidden_from_the_processes_of_an_own_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.setenv("JUDGE_KEY", KEY)
    cluster = Cluster("local", relays={"judge": lr.Upstream(base_url=HERE, api_key_env="JUDGE_KEY")})
    with environment(cluster._front_door(tmp_path)):
        assert "JUDGE_KEY" not in os.environ
    assert os.environ["JUDGE_KEY"] == KEY


def test_the_file_of_upstreams(tmp_path: Path) -> None:
    file = tmp_path / "upstreams.toml"
    file.write_text(
        f'[judge]\nbase_url = "{HERE}"\nmodel = "large"\n[claude]\nbase_url = "http://a"\nkind = "anthropic"'
    )
    assert {name: one.kind for name, one in read_upstreams(file).items()} == {"judge": "openai", "claude": "anthropic"}
    for text, reason in (("", "names none"), ("[judge", "cannot be read"), ("[judge]\nbase_ur = 1", "base_url")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_upstreams(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_upstreams(tmp_path / "none")


def test_without_a_secret_nothing_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    assert find_secret(file) == b"0123456789abcdef"
    for given in (None, tmp_path / "none"):
        with pytest.raises(ConfigError, match="secret"):
            find_secret(given)
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(ConfigError, match="16 characters"):
        find_secret(None)
