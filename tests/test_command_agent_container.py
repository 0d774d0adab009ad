"""Programs in containers: the engine's command line, and an engine of which only the command line is real."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.programs.container import container_command, find_engine
from tests.command_agents import play

ENGINE = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
[ "$1" = rm ] && exit 0
[ -n "$(ls "$(dirname "$0")/broken" 2>/dev/null)" ] && { echo "no daemon" >&2; exit 125; }
while [ "$1" != some/image ]; do shift; done
shift
exec "$@"
"""


def test_the_command_line() -> None:
    line = container_command(
        "/bin/docker",
        "some/image",
        ["node", "agent.js"],
        name="lightning-1",
        variables=["B", "A"],
        folders=[Path("/f"), Path("/w")],
        workdir=Path("/f/work"),
        interactive=True,
        memory_bytes=2**30,
        cpu_seconds=60,
    )
    user = f"--user {os.getuid()}:{os.getgid()}"
    assert " ".join(line) == (
        f"/bin/docker run --rm --init --name lightning-1 --network host --interactive {user} --volume /f:/f "
        "--volume /w:/w --workdir /f/work --env A --env B --memory 1073741824 --ulimit cpu=60 some/image node agent.js"
    )


def test_podman_maps_users_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> list[str]:
        return container_command("/bin/podman", "i", ["a"], name="n", variables=[], folders=[], workdir=None)

    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert " ".join(line()) == "/bin/podman run --rm --init --name n --network host --userns keep-id i a"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert " ".join(line()) == "/bin/podman run --rm --init --name n --network host i a"


def test_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(lr.AgentError, match="there is no docker or podman on PATH='/nowhere'"):
        find_engine(None)
    with pytest.raises(lr.AgentError, match="there is no podman on PATH"):
        find_engine("podman")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(ENGINE)
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


async def test_a_program_runs_in_its_image_with_its_folder_and_variables(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd/data").write_text("0.5")
    agent = lr.CommandAgent(
        ["sh", "-c", "cp data $LIGHTNING_REWARD_FILE; echo $OPENAI_MODEL $MINE"],
        image="some/image",
        cwd=tmp_path / "cwd",
        env={"MINE": "secret-value"},
    )
    played = await play(agent)
    assert played.result == 0.5 and played.stdout == "policy secret-value\n"
    [call] = (engine / "calls").read_text().splitlines()
    assert "--env MINE" in call and "secret-value" not in call and "--env PATH" not in call and "--env HOME" not in call
    assert "--env OPENAI_API_KEY" in call and "key-1" not in call and "/work some" not in call.split("--workdir")[0]


async def test_without_cwd_it_starts_where_the_image_says(engine: Path) -> None:
    await play(lr.CommandAgent("true", shell=True, image="some/image", reward="exit"))
    call = (engine / "calls").read_text()
    assert "--workdir" not in call and call.endswith("some/image sh -c true\n")


async def test_an_engine_that_fails_is_no_failure_of_the_agents(engine: Path) -> None:
    (engine / "broken").mkdir()
    (engine / "broken/yes").touch()
    with pytest.raises(lr.InfrastructureError, match=r"(?s)engine could not run true; .*no daemon"):
        await play(lr.CommandAgent(["true"], image="some/image"))


async def test_a_container_out_of_memory_is_infrastructure(engine: Path) -> None:
    with pytest.raises(lr.InfrastructureError, match="killed by SIGKILL"):
        await play(lr.CommandAgent(["sh", "-c", "exit 137"], image="some/image"))


async def test_a_container_that_has_to_be_stopped_is_removed(engine: Path) -> None:
    agent: Any = lr.CommandAgent(
        [sys.executable, "-c", "import time; time.sleep(1000)"], image="some/image", timeout_seconds=0.5
    )
    with pytest.raises(lr.AgentError, match="ran longer"):
        await play(agent)
    deadline = time.monotonic() + 5
    while "\n" not in (engine / "calls").read_text().strip():
        assert time.monotonic() < deadline
    run, removed = (engine / "calls").read_text().splitlines()
    name = run.split("--name ")[1].split()[0]
    assert removed == f"rm --force {name}"
