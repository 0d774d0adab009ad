"""A run at a URL: its copy can be resumed whenever it broke off, and one process works on it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lightning_ray.cli import main
from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.evaluation.subject import subject_of
from lightning_ray.mirror import claim as claim_module
from lightning_ray.mirror import is_url, place_of, run_place, url_of
from lightning_ray.mirror import mirror as mirror_module
from lightning_ray.mirror.claim import RECORD, Owner, read_owner
from lightning_ray.mirror.copying import RunCopy
from lightning_ray.mirror.mirror import Mirror
from lightning_ray.mirror.nodes import hand_over, present
from lightning_ray.mirror.pull import everything, fetched, pull
from lightning_ray.mirror.remote import RemoteFolder
from lightning_ray.mirror.taking_up import take_up
from lightning_ray.run.folder import RunFolder
from lightning_ray.store import SpanStore, open_folder
from tests.store_folders import BY_HAND, run

Machines = Callable[[str], None]
NOTES: list[str] = []


@pytest.fixture(params=["memory", "file"])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a folder of runs."""
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/runs" if request.param == "memory" else f"file://{tmp_path}/remote/runs"


@pytest.fixture(autouse=True)
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Go to another machine: another cache."""

    def go(name: str) -> None:
        monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(tmp_path / name))

    NOTES.clear()
    go("first")
    return go


def checkpoint(folder: RunFolder, step: int, rollouts: list[str]) -> None:
    writing = folder.begin_checkpoint(step)
    (writing / "trainer_state").mkdir(parents=True)
    (writing / "model.safetensors").write_bytes(bytes([step]) * 5000)
    (writing / "trainer_state" / "rank_0.pt").write_text(f"optimizer {step}")
    (writing / "config.json").write_text("{}")
    folder.commit_checkpoint(writing, step, {"step": step, "rollouts": rollouts, "policies": {}})


class Training:
    """What a run does to its folder: rollouts, figures, a checkpoint each step; the store compacts now and then."""

    def __init__(self, url: str) -> None:
        self.folder = RunFolder(run_place(url, "sql"))
        self.claim = take_up(self.folder, False, NOTES.append)
        (self.folder.path / "model").mkdir()
        (self.folder.path / "model" / "config.json").write_text("{}")
        self.store = SpanStore(self.folder.store, compaction=BY_HAND, file_bytes=2000)
        self.rollouts: list[str] = []

    def step(self, number: int) -> None:
        for each in range(3):
            self.rollouts.append(f"ro-{number}-{each}")
            run(self.store, self.rollouts[-1])
        if number % 2:
            self.store.storage.compact()
        self.folder.append_step({"step": number, "groups": [["g", self.rollouts[-3:]]]})
        with (self.folder.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "train", "step": number, "reward": 0.5}) + "\n")
            if number == 1:
                file.write(json.dumps({"kind": "val", "mode": "greedy", "step": 2, "reward": 0.9}) + "\n")
        checkpoint(self.folder, number + 1, list(self.rollouts))

    def end(self) -> None:
        self.store.close()
        self.claim.release()


def check_whole(folder: RunFolder) -> int:
    """A pulled run: its last checkpoint is whole, and its store has every rollout that this counts; the step."""
    latest = folder.latest_checkpoint()
    assert latest is not None
    state = folder.read_state()
    assert (latest / "model.safetensors").read_bytes() == bytes([state["step"]]) * 5000
    assert (latest / "trainer_state" / "rank_0.pt").read_text() == f"optimizer {state['step']}"
    view = open_folder(folder.store)
    spans = view.scan_spans(state["rollouts"])
    assert spans.num_rows == 3 * len(state["rollouts"])
    assert {view.get_rollout_by_id(name).status for name in state["rollouts"]} == {"succeeded"}  # type: ignore[union-attr]
    assert sorted(folder.steps())[: state["step"]] == list(range(state["step"]))
    assert len(folder.metrics()) >= state["step"]
    return int(state["step"])


def test_a_url_and_its_place_tell_each_other(tmp_path: Path) -> None:
    for url in ("s3://bucket/a/b c", "gs://b/x", "memory://b/x", "file:///tmp/x/y", "abfs://c@account.example/x=1"):
        place = place_of(url)
        assert is_url(url) and url_of(place) == url and place.is_relative_to(tmp_path / "first")
        assert url_of(place / "checkpoints/step-000001") == f"{url}/checkpoints/step-000001"
    assert url_of(tmp_path) is None and run_place("runs", "sql") == Path("runs/sql").absolute()
    assert run_place("s3://b/runs/", "sql") == place_of("s3://b/runs/sql")
    for bad, told in (
        ("s3://", "no folder's URL"),
        ("s3://b/../c", "no folder's URL"),
        ("sftp://me:word@host/x", "holds a password"),
    ):
        with pytest.raises(ConfigError, match=told) as refused:
            place_of(bad)
        assert "word@" not in str(refused.value)


def test_a_protocol_that_is_not_there_is_named_with_its_package() -> None:
    for url, told in (("adl://b/x", "install adlfs"), ("nonsense://b/x", "Protocol not known: nonsense; give a URL")):
        with pytest.raises(ConfigError, match=told):
            RemoteFolder(url)


def test_another_machine_goes_on_where_the_run_stood(runs: str, machines: Machines) -> None:
    training = Training(runs)
    copy = RunCopy(training.folder.path)
    for step in range(6):
        training.step(step)
        copy.round()
    training.end()
    copy.round()
    assert copy.missing() == []
    there = RemoteFolder(f"{runs}/sql").files()
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/step")} == {
        f"step-{step:06d}" for step in (2, 4, 5, 6)
    }, "the last ones, and the one that was best"
    assert sum(name.endswith(".parquet") for name in there) == len(list(training.folder.store.glob("*/*.parquet")))

    machines("second")
    folder = RunFolder(run_place(runs, "sql"))
    assert not folder.path.exists()
    take_up(folder, True, NOTES.append).release()
    assert check_whole(folder) == 6
    assert [path.name for path in folder.checkpoints.glob("step-*")] == ["step-000006"]
    for name in ("metrics.jsonl", "steps.jsonl", "model/config.json"):
        assert (folder.path / name).read_bytes() == (training.folder.path / name).read_bytes()

    machines("first")  # where the second machine's end is not known
    (training.folder.path / "mine").write_text("unsent")
    take_up(training.folder, True, NOTES.append).release()
    assert check_whole(training.folder) == 6
    assert [path.name[:4] for path in training.folder.path.parent.glob("sql-*")] == ["sql-"], "kept, as it may be newer"


def test_where_it_was_worked_on_last_nothing_is_pulled(runs: str) -> None:
    training = Training(runs)
    training.step(0)
    RunCopy(training.folder.path).round()
    training.step(1)
    training.end()
    take_up(training.folder, True, NOTES.append).release()
    assert check_whole(training.folder) == 2, "the second step never was at the URL"
    assert fetched(training.folder.path, everything) == training.folder.path and check_whole(training.folder) == 2


class Broken(Exception):
    """The storage, or the machine, is gone."""


@pytest.mark.parametrize("late", [False, True])
def test_wherever_it_breaks_off_what_is_there_can_be_resumed(
    runs: str, machines: Machines, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Every change of the storage fails once, before or after it was made; then the run goes on to its end."""
    made = 0
    breaks_at: int | None = None

    def breaking(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any) -> None:
            nonlocal made
            made += 1
            if made == breaks_at and not late:
                raise Broken
            change(*arguments)
            if made == breaks_at and late:
                raise Broken

        return changed

    for name in ("put", "write", "remove"):
        monkeypatch.setattr(RemoteFolder, name, breaking(getattr(RemoteFolder, name)))
    training = Training(runs)
    copy = RunCopy(training.folder.path)
    for step in range(3):
        training.step(step)
        copy.round()
    reached = []
    for step in range(3, 5):
        training.step(step)
        breaks_at, broken = 0, True
        while broken:
            made, breaks_at = 0, breaks_at + 1
            try:
                copy.round()
                broken = False
            except Broken:
                machines(f"machine-{step}-{breaks_at}")
                place = run_place(runs, "sql")
                pull(place, everything)
                reached.append(check_whole(RunFolder(place)))
                machines("first")
    training.end()
    breaks_at = None
    assert reached == sorted(reached) and {3, 4} <= set(reached) and len(reached) > 10
    copy.round()
    machines("last")
    pull(run_place(runs, "sql"), everything)
    assert check_whole(RunFolder(run_place(runs, "sql"))) == 5


def test_a_store_at_work_is_a_store_at_the_other_end(runs: str, machines: Machines) -> None:
    """Rounds beside a writer that compacts all the time."""
    training = Training(runs)
    training.step(0)
    copy = RunCopy(training.folder.path)
    counts = []
    done = threading.Event()

    def write() -> None:
        for step in range(1, 12):
            training.step(step)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set() or not counts:
        try:
            copy.round()
        except FileNotFoundError:  # the checkpoint was dropped: the next round has the next one
            continue
        place = place_of(f"{runs}/sql")
        machines(f"reader-{len(counts)}")
        reader = run_place(runs, "sql")
        pull(reader, everything)
        counts.append(check_whole(RunFolder(reader)))
        machines("first")
        assert place.exists()
    writer.join()
    training.end()
    copy.round()
    assert counts == sorted(counts) and copy.missing() == []


def test_reading_commands_take_a_url(runs: str, machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(runs)
    training.step(0)
    training.end()
    RunCopy(training.folder.path).round()
    machines("reader")
    arguments = ["spans", "SELECT count(*) AS n FROM spans", f"{runs}/sql", "--format", "json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 9}
    assert main(["doctor", f"{runs}/sql", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rollouts"] == 3
    assert not list(run_place(runs, "sql").rglob("*.safetensors")), "weights are not needed to read"
    assert main(["spans", "SELECT 1", f"{runs}/nothing"]) == 2
    assert f"{runs}/nothing: there is nothing" in capsys.readouterr().err


def test_what_is_evaluated_may_be_at_a_url(runs: str, machines: Machines) -> None:
    training = Training(runs)
    for step in range(2):
        training.step(step)
    training.end()
    RunCopy(training.folder.path).round()
    machines("reader")
    for text, found in ((f"{runs}/sql", "step-000002"), (f"{runs}/sql@1", "step-000001")):
        [model] = subject_of(text, None).models.values()  # type: ignore[arg-type]
        assert isinstance(model, Path) and model.name == found and (model / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="there is no such checkpoint; there are latest, best, initial, 1, 2"):
        subject_of(f"{runs}/sql@7", None)  # type: ignore[arg-type]


def test_a_model_is_brought_to_other_nodes_and_a_changed_one_again(runs: str, machines: Machines) -> None:
    place = run_place(runs, "sql") / "model"
    remote = RemoteFolder(f"{runs}/sql")
    remote.write("model/weights", b"first")
    machines("node")
    assert (present(run_place(runs, "sql") / "model") / "weights").read_bytes() == b"first"
    remote.write("model/weights", b"other")
    assert (present(run_place(runs, "sql") / "model") / "weights").read_bytes() == b"other"
    machines("first")
    place.mkdir(parents=True)
    (place / "weights").write_bytes(b"mine!")
    assert (present(place) / "weights").read_bytes() == b"mine!", "what was written here is not fetched"
    assert present(Path("runs/sql/model")) == Path("runs/sql/model")
    with pytest.raises(InfrastructureError, match="is not on this node, and there is nothing at"):
        present(run_place(runs, "never") / "model")


def test_what_ranks_on_another_node_wrote_is_at_the_url_and_comes_back(runs: str, machines: Machines) -> None:
    machines("node")
    checkpoints = run_place(runs, "sql") / "checkpoints"
    writing = checkpoints / ".writing-000003"
    (writing / "trainer_state").mkdir(parents=True)
    (writing / "trainer_state" / "rank_1.pt").write_text("moments")
    hand_over(writing, checkpoints / "step-000003")
    assert not writing.exists()
    machines("first")
    brought = present(run_place(runs, "sql") / "checkpoints" / "step-000003")
    assert (brought / "trainer_state" / "rank_1.pt").read_text() == "moments"


# The claim


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewed often, and watched for not so long."""
    monkeypatch.setattr(claim_module, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(claim_module, "SILENT_SECONDS", 2.0)


def test_a_run_that_is_worked_on_is_refused_with_the_name_of_who_does(tmp_path: Path, brief: None) -> None:
    path = tmp_path / "runs" / "sql"
    first = take_up(RunFolder(path), False, NOTES.append)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=rf"worked on by process {os.getpid()} on .*kill {os.getpid()}.*--name"):
            take_up(RunFolder(path), resume, NOTES.append)
    assert [each.name for each in path.parent.iterdir()] == ["sql"], "the live run is where it was"
    first.release()
    take_up(RunFolder(path), False, NOTES.append).release()
    assert len(list(path.parent.iterdir())) == 2


def test_a_process_that_died_has_no_claim(tmp_path: Path) -> None:
    path = tmp_path / "sql"
    code = "import sys, os; from pathlib import Path; from lightning_ray.mirror.taking_up import take_up\n"
    code += "from lightning_ray.run.folder import RunFolder\n"
    code += "take_up(RunFolder(Path(sys.argv[1])), False, print); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert not Owner(**json.loads((path / RECORD).read_text())).ended
    take_up(RunFolder(path), False, NOTES.append).release()


def test_an_owner_on_another_machine_is_alive_if_it_renews(runs: str, machines: Machines, brief: None) -> None:
    first = take_up(RunFolder(run_place(runs, "sql")), False, NOTES.append)
    first._own = replace(first._own, host="elsewhere", job="raysubmit_1")
    while (told := read_owner(first._place)) is None or told.host != "elsewhere":
        time.sleep(0.05)
    machines("second")
    folder = RunFolder(run_place(runs, "sql"))
    with pytest.raises(ConfigError, match=r"worked on by job raysubmit_1 .*lightning-ray stop raysubmit_1"):
        take_up(folder, False, NOTES.append)
    first._done.set()  # it dies
    assert first._renewing is not None
    first._renewing.join()
    take_up(folder, False, NOTES.append).release()
    assert "waiting 2 s at most for a sign of it" in NOTES[-1] and "raysubmit_1" in NOTES[-1]


def test_who_lost_its_claim_writes_no_more(runs: str, brief: None) -> None:
    training = Training(runs)
    training.step(0)
    other = Owner("other", "elsewhere", 1, 0.0)
    training.claim._place.write(RECORD, json.dumps(vars(other)).encode())
    assert training.claim._renewing is not None
    training.claim._renewing.join(10)
    with pytest.raises(InfrastructureError, match="taken over by process 1 on elsewhere"):
        training.claim.verify()
    training.end()
    left = training.claim._place.read(RECORD)
    assert left is not None and json.loads(left)["writer"] == "other"


# The thread


class Storage:
    """Fails while it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = False
        put = RemoteFolder._put

        def failing(*arguments: Any) -> None:
            if self.fails:
                raise OSError("no such bucket")
            put(*arguments)

        monkeypatch.setattr(RemoteFolder, "_put", failing)
        monkeypatch.setattr(mirror_module, "RETRY_SECONDS", (0.05,))


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    made = Storage(monkeypatch)
    yield made
    made.fails = False


async def test_a_storage_that_fails_is_told_once_and_caught_up_with(
    runs: str, machines: Machines, storage: Storage
) -> None:
    training = Training(runs)
    mirror = Mirror.of(training.folder.path, training.claim, NOTES.append)
    assert mirror is not None
    training.step(0)
    mirror.ask()
    await mirror.settled("checkpoint 1")
    assert NOTES == []
    storage.fails = True
    training.step(1)
    mirror.ask()
    await mirror.settled("checkpoint 2")
    await asyncio.sleep(0.3)
    assert len(NOTES) == 2 and "is not kept up: OSError: no such bucket" in NOTES[0]
    assert NOTES[1].startswith(f"checkpoint 2 is not at {runs}/sql yet: no such bucket")
    storage.fails = False
    training.step(2)
    training.end()
    await mirror.finish(30)
    mirror.verify()
    assert NOTES[2:] == [f"{runs}/sql is kept up again", f"all of it is at {runs}/sql"]
    machines("second")
    pull(run_place(runs, "sql"), everything)
    assert check_whole(RunFolder(run_place(runs, "sql"))) == 3


async def test_what_is_not_there_at_the_end_is_named(runs: str, storage: Storage) -> None:
    training = Training(runs)
    mirror = Mirror.of(training.folder.path, training.claim, NOTES.append)
    assert mirror is not None
    storage.fails = True
    training.step(0)
    await mirror.finish(0.3)
    with pytest.raises(InfrastructureError, match=f"{runs}/sql lacks .* more: no such bucket.*{training.folder.path}"):
        mirror.verify()
    assert check_whole(training.folder) == 1
    training.end()
    assert Mirror.of(Path("runs/sql"), training.claim, NOTES.append) is None
