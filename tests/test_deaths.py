"""Deaths are told in one sentence, from Ray's words and a node's evidence: who, why, what was lost, what comes next."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightning_ray.cluster import Cluster
from lightning_ray.commands.doctor_events import show_events
from lightning_ray.deaths import Death, Process, death_of, told_of
from lightning_ray.deaths.evidence import GONE, Evidence, gather, log_end
from lightning_ray.deaths.exits import Exits, in_words
from lightning_ray.deaths.told import Told
from lightning_ray.deaths.watch import DeathWatch, Known, role_of, untold
from lightning_ray.errors import InfrastructureError, TrainersLostError
from lightning_ray.run.events import Events, read_events

WORDLESS = (
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. E"
)
RUNNER = Process("runner", "runner-0-a1b2c3", 7, "node-id", "10.0.0.1", None, memory_kills=3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"The actor died unexpectedly.\n{WORDLESS}", Told("wordless", "its process ended without a word to Ray")),
        (
            "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker exits with an exit code 3.",
            Told("exit", "it exited with code 3"),
        ),
        (
            "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: The node is running low on memory.\n"
            "Memory on the node (IP: 10.0.0.1, ID: ab) was 15.20GB used / 16.00GB limit (0.950000)",
            Told(
                "memory monitor",
                "killed by Ray's memory monitor, as its node was short of memory: 15.20GB used / 16.00GB limit",
            ),
        ),
        (
            "The actor died because its node has died. Node Id: ab\n\tthe actor's node was terminated: no beat",
            Told("node", "its node died: terminated: no beat"),
        ),
        ("The actor is dead because it was killed by `ray.kill`.", Told("killed", "killed by ray.kill")),
    ],
)
def test_what_ray_says_is_understood(text: str, told: Told) -> None:
    assert told_of(RuntimeError(text)) == told == told_of(text)


async def test_a_rank_that_rays_memory_monitor_kills_is_a_lost_rank() -> None:
    from ray.exceptions import OutOfMemoryError

    from actors.policy_trainer import PolicyTrainerGroup

    async def killed() -> None:
        raise OutOfMemoryError(
            "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: ab) "
            "was 15.3GB used / 16.0GB limit (0.95)\nOOM kill reason: ..."
        )

    told: list[Death] = []
    group = PolicyTrainerGroup([None], told.append)
    with pytest.raises(TrainersLostError, match=r"trainer rank 0 died during 'update': killed by Ray's memory monitor"):
        await group.answers([killed()], "update", 5.0)
    assert "15.3GB used / 16.0GB limit" in told[0].cause and "micro_batch_tokens" in told[0].next


def test_what_a_part_raised_is_its_cause() -> None:
    class RayTaskError(Exception):
        cause = ValueError("no module of mine")

    assert told_of(RayTaskError()) == Told("error", "ValueError: no module of mine")


@pytest.mark.parametrize(
    ("evidence", "cause", "advice"),
    [
        (Evidence("killed by SIGKILL", "", 4), "killed by the kernel for want of memory", True),
        (Evidence("killed by SIGKILL", "", 3), "killed by SIGKILL, not for want of memory", False),
        (Evidence("killed by SIGSEGV", "a | b", 3), "killed by SIGSEGV; last lines of its log: a | b", False),
        (Evidence("exited with code 3", "", 3), "it exited with code 3", False),
        (Evidence(None, "a | b", None), "its process ended without a word to Ray; last lines of its log: a | b", False),
        (Evidence(), "without a word to Ray: SIGKILL, by hand or for want of memory", False),
        (Evidence(missing="it did not tell"), "its process ended without a word to Ray (it did not tell)", False),
        (GONE, "its node died, and its log is gone with it", False),
    ],
)
def test_a_wordless_end_is_told_by_evidence(evidence: Evidence, cause: str, advice: bool) -> None:
    death = death_of(RUNNER, WORDLESS, evidence)
    assert cause in death.cause and ("concurrency" in death.next) == advice
    assert str(death).startswith("runner-0-a1b2c3 died (process 7, node 10.0.0.1): ") and "Lost: no rollout." in str(
        death
    )


def test_the_call_that_was_not_answered_is_named() -> None:
    death = death_of(Process("trainer rank", "1"), WORDLESS, Evidence(), during="update")
    assert str(death).startswith("trainer rank 1 died during 'update': ")
    assert "the steps since the last checkpoint" in str(death)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and pidfds are Linux's")
def test_the_end_of_a_process_that_is_not_our_child_is_known(tmp_path: Path) -> None:
    script = "sleep 60 & echo $!; sh -c 'read _; exit 3' & echo $!; wait"
    parent = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    killed, _ = (int(parent.stdout.readline()) for _ in range(2))
    exits = Exits()
    exits.hold(killed)
    os.kill(killed, signal.SIGKILL)
    parent.wait(10)
    if exits.of(killed) is None:
        pytest.skip("Linux tells the status of others' children from 6.15 on")
    assert exits.of(killed) == "killed by SIGKILL"
    exits.close()
    assert exits.of(killed) is None
    assert [in_words(status) for status in (0, 3 << 8, 11)] == [
        "exited with code 0",
        "exited with code 3",
        "killed by SIGSEGV",
    ]


def test_a_log_ends_in_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(":job_id:01\n" + "x" * 10_000 + "\nFatal Python error: Aborted\n")
    assert gather(None, str(log)).words.endswith("Fatal Python error: Aborted")
    assert log_end(str(tmp_path / "none")) == ""


def test_serves_actors_are_known_by_their_names() -> None:
    mine = ["run-1", "run-1-relay"]
    assert role_of("SERVE_REPLICA::run-1#policy#ab12", mine) == ("policy replica", "ab12")
    assert role_of("SERVE_REPLICA::run-1-relay#relay#ab12", mine) == ("relay", "ab12")
    assert role_of("SERVE_REPLICA::other#policy#ab12", mine) == (None, "")
    assert role_of("SERVE_CONTROLLER_ACTOR", mine) == ("Serve's controller", "")
    assert role_of("SERVE_PROXY_ACTOR-ab", mine) == ("Serve's proxy", "")
    assert role_of("stranger", mine) == (None, "")


def test_what_was_meant_is_not_told_but_for_a_replica_that_serve_takes_away() -> None:
    killed, exited = Told("killed", "killed by ray.kill"), Told("exit", "it exited with code 1")
    assert untold("relay", "DEAD", killed) is None
    assert "health check" in (untold("policy replica", "DEAD", killed) or exited).words
    assert untold("span store", "ALIVE", killed) == killed, "Ray started it again: that was not meant"
    assert untold("policy replica", "DEAD", exited) == exited
    assert (untold("span store", "ALIVE", Told("lost", "")) or exited).kind == "wordless"


def test_events_are_shown_and_kept(tmp_path: Path) -> None:
    shown: list[str] = []
    events = Events(tmp_path, shown.append)
    death = Death(RUNNER, "killed by SIGKILL", "no rollout", "another takes its place", time=1.5)
    events.death(death)
    events.death(replace(death, process=replace(RUNNER, pid=8)), shown=False)
    events.waiting("step 3 takes 80 s", ["phase: rollouts"])
    assert shown == [str(death), "step 3 takes 80 s\n  phase: rollouts"]
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"half": 1})[:5])
    first, second, waiting = read_events(tmp_path)
    assert second == {**first, "pid": 8}
    assert first == {
        "time": 1.5,
        "kind": "death",
        "role": "runner",
        "name": "runner-0-a1b2c3",
        "node": "10.0.0.1",
        "pid": 7,
        "cause": "killed by SIGKILL",
        "lost": "no rollout",
        "next": "another takes its place",
    }
    assert (waiting["kind"], waiting["parts"]) == ("waiting", ["phase: rollouts"])


def test_doctor_lists_what_died_and_when_the_run_was_late(tmp_path: Path) -> None:
    events = Events(tmp_path)
    for number in range(10):
        runner = replace(RUNNER, pid=number + 1)
        events.death(Death(runner, f"cause {number}", "no rollout", "another takes its place"))
    events.waiting("step 3 lasts 80 s", ["runners: 2 up"])
    console = Console(file=io.StringIO(), width=100)
    show_events(read_events(tmp_path), console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10 parts died" in told and "cause 9" in told and "cause 1\n" not in told
    assert "Late 1 times" in told and "step 3 lasts 80 s\n  runners: 2 up" in told
    show_events([], silent := Console(file=io.StringIO()))
    assert silent.file.getvalue() == ""  # type: ignore[attr-defined]


async def test_a_ray_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ConnectionError("a traceback\nnobody listens\n")

    monkeypatch.setattr("ray.init", refuses)
    with pytest.raises(InfrastructureError, match=r"no Ray .* at address='10\.0\.0\.1:6379' \(nobody listens\)"):
        Cluster("10.0.0.1:6379").start_ray()


def test_a_death_that_several_calls_find_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    events = Events(tmp_path, said.append)
    for pid in (7, 7, 8):
        events.death(death_of(Process("trainer rank", "trainer rank 0", pid), "killed", Evidence()))
    assert len(said) == 2 and [event["pid"] for event in read_events(tmp_path)] == [7, 8]


def test_a_look_that_is_under_way_is_broken_off_when_the_watch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would call a Ray that is being shut down."""
    watch, seen = DeathWatch(lambda death: None, list, lambda death: None), list[str]()
    watch._known = {name: Known(Process("relay", name)) for name in ("one", "two", "three")}
    for what in ("_look_at_nodes", "_find"):
        monkeypatch.setattr(watch, what, lambda: None)

    def look_at(name: str) -> None:
        seen.append(name)
        if name == "two":
            watch.stop()

    monkeypatch.setattr(watch, "_look_at", look_at)
    watch._look()
    assert seen == ["one", "two"]
