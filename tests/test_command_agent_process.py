"""Programs as processes: many at once, ended in time with all that they started, whoever dies first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import lightning_ray as lr
from lightning_ray.programs.output import BoundedText
from lightning_ray.programs.process import wardens
from tests.command_agents import play, python, running_with, sh

ROOT = Path(__file__).resolve().parent.parent
STUBBORN = "trap '' TERM; while true; do sleep 0.05; done"
FAMILY = f"""
sh -c 'while true; do sleep 0.05; done' "$1" &
sh -c "{STUBBORN}" "$1" &
setsid sh -c 'while true; do sleep 0.05; done' "$1" &
(setsid sh -c "{STUBBORN}" "$1" &)
env -i /bin/sh -c "{STUBBORN}" "$1" &
echo started > "$2"
"""
"""A child, one that ignores SIGTERM, one that leaves the group, a stubborn daemon, and one without variables."""


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within its time"
        await asyncio.sleep(0.02)


async def test_many_run_at_once() -> None:
    begun = time.monotonic()
    agent = sh('sleep 2; printf "%s" "$1"', "{task}", reward="stdout")
    played = await asyncio.gather(*(play(agent, n, number=n) for n in range(64)))
    assert [one.result for one in played] == list(range(64)) and time.monotonic() - begun < 30
    assert {len(one.trace.spans) for one in played} == {1}
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


def test_a_loop_of_another_thread_will_do() -> None:
    results: list[Any] = []

    def run() -> None:
        results.append(asyncio.run(play(sh("echo 0.5; kill -0 $$", reward="stdout"))))

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(30)
    assert [played.result for played in results] == [0.5, 0.5]


async def test_nothing_is_left_when_a_program_ends(mark: str, tmp_path: Path) -> None:
    await play(sh(f"{FAMILY} exit 0", mark, str(tmp_path / "started"), reward="exit"))
    assert not running_with(mark)


async def test_at_the_time_limit_everything_is_ended(mark: str, tmp_path: Path) -> None:
    agent = sh(f"{FAMILY} {STUBBORN}", mark, str(tmp_path / "s"), timeout_seconds=1.0, grace_seconds=0.3)
    begun = time.monotonic()
    with pytest.raises(lr.AgentError, match="ran longer than timeout_seconds and was ended after"):
        await play(agent)
    assert time.monotonic() - begun < 10 and not running_with(mark)


async def test_one_of_the_group_that_ignores_the_end_is_killed_after_the_grace(mark: str) -> None:
    agent = sh(f'env -i /bin/sh -c "{STUBBORN}" "$1" & exec sleep 1000', mark, timeout_seconds=0.5, grace_seconds=0.3)
    with pytest.raises(lr.AgentError, match="ran longer"):
        await play(agent)
    assert not running_with(mark)


async def test_a_program_that_heeds_sigterm_may_clean_up() -> None:
    code = "trap 'echo 0.25 > $LIGHTNING_REWARD_FILE; exit 0' TERM; echo ready; while true; do sleep 0.05; done"
    begun = time.monotonic()
    played = await play(sh(code, timeout_seconds=1.0, grace_seconds=30.0))
    assert played.result == 0.25 and played.program["timed_out"] and time.monotonic() - begun < 20


async def test_a_grandchild_may_clean_up_after_its_parent_is_gone(tmp_path: Path) -> None:
    child = "trap 'sleep 0.3; echo done > \"$1\"; exit 0' TERM; while true; do sleep 0.05; done"
    agent = sh(
        'sh -c "$2" sh "$1" & exec sleep 1000', str(tmp_path / "file"), child, timeout_seconds=1.0, reward="exit"
    )
    assert (await play(agent)).result == 0.0 and (tmp_path / "file").read_text() == "done\n"


async def test_cancelling_the_attempt_ends_everything(mark: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    agent = sh(f"{FAMILY} echo said; {STUBBORN}", mark, str(tmp_path / "started"), grace_seconds=0.2, keep_folders=kept)
    task = asyncio.create_task(play(agent))
    await until((tmp_path / "started").exists)
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running_with(mark)


async def test_cancelling_at_any_moment_leaves_neither_processes_nor_folders(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    agent = sh("sleep 1000", mark, grace_seconds=0.2)
    for delay in range(12):
        task = asyncio.create_task(play(agent))
        await asyncio.sleep(delay / 500)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() and not running_with(mark)
    await until(lambda: not list(tmp_path.glob("lightning-*")))


RUNNER = """
import asyncio, sys
from tests.command_agents import play, sh
agent = sh(sys.argv[1], *sys.argv[2:], grace_seconds=0.3)
asyncio.run(play(agent))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_when_the_runner_dies_so_do_its_programs(mark: str, tmp_path: Path, number: int) -> None:
    runner = subprocess.Popen(  # noqa: ASYNC220
        [
            sys.executable,
            "-c",
            RUNNER,
            f'{FAMILY} echo $PPID > "$3"; {STUBBORN}',
            mark,
            *(str(tmp_path / n) for n in "ab"),
        ],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    await until((tmp_path / "b").exists)
    await until(lambda: (tmp_path / "b").read_text())
    warden = int((tmp_path / "b").read_text())
    os.kill(runner.pid, number)
    runner.wait()
    await until(lambda: not running_with(mark) and not psutil.pid_exists(warden), 10)
    await until(lambda: not list(tmp_path.glob("lightning-*")), 5)


async def test_when_the_warden_dies_its_programs_do_and_the_next_has_another(mark: str, tmp_path: Path) -> None:
    task = asyncio.create_task(play(sh('echo $PPID > "$2"; sleep 1000 & wait', mark, str(tmp_path / "pid"))))
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(lr.InfrastructureError, match=r"the warden, .* died"):
        await asyncio.wait_for(task, 10)
    await until(lambda: not running_with(mark), 5)
    assert (await play(sh("true", reward="exit"))).result == 1.0


async def test_the_warden_goes_when_its_loop_is_done(tmp_path: Path) -> None:
    pids: list[int] = []

    def run() -> None:
        pids.append(int(asyncio.run(play(sh("echo $PPID", reward=None))).stdout))

    await asyncio.to_thread(run)
    wardens.here()
    await until(lambda: not psutil.pid_exists(pids[0]), 5)


async def test_a_limit_of_memory() -> None:
    with pytest.raises(lr.AgentError, match=r"(?s)exited with code 1 .*MemoryError"):
        await play(python("x = bytearray(2**30)", memory_bytes=2**28))
    assert (await play(python("x = bytearray(2**20)", memory_bytes=2**28, reward="exit"))).result == 1.0


async def test_a_limit_of_processor_time() -> None:
    with pytest.raises(lr.AgentError, match="was ended by SIGXCPU, having used its cpu_seconds=1 after"):
        await play(python("while True: pass", cpu_seconds=1))


async def test_one_that_prints_and_prints_is_not_waited_for(mark: str) -> None:
    begun = time.monotonic()
    with pytest.raises(lr.AgentError, match="ran longer"):
        await play(sh("yes", mark, timeout_seconds=0.5, grace_seconds=0.2))
    assert time.monotonic() - begun < 10


async def test_programs_do_not_inherit_open_files(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with contextlib.suppress(lr.AgentError):
            await play(sh("true"))
        played = await play(sh("ls /proc/self/fd | wc -l", reward=None))
    assert int(played.stdout) <= 4


async def test_signals_are_not_blocked_or_ignored() -> None:
    """As if this process were in a script's background."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGQUIT)}
    try:
        played = await play(sh("grep -E 'Sig(Blk|Ign)' /proc/self/status", reward=None))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    masks = [int(line.split()[1], 16) for line in played.stdout.splitlines()]
    of_the_c_library = 0b11 << 31  # signals 32 and 33, which no program can set
    assert len(masks) == 2 and not any(mask & ~of_the_c_library for mask in masks)


@pytest.mark.parametrize("pieces", [[5], [3, 3], [10], [11], [20], [21], [7, 7, 7, 7], [100], [1] * 50])
def test_bounded_text(pieces: list[int]) -> None:
    kept, everything = BoundedText(10), b""
    for index, size in enumerate(pieces):
        data = bytes((index + offset) % 26 + 97 for offset in range(size))
        kept.add(data)
        everything += data
    text, cut = everything.decode(), len(everything) - 20
    assert kept.text() == (text if cut <= 0 else f"{text[:10]}\n[... {cut} bytes cut ...]\n{text[-10:]}")
