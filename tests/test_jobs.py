"""Jobs without a cluster: what an entrypoint says, what is handed on, and what is refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lightning_ray.cli import main, parser
from lightning_ray.commands.jobs import show, training_arguments, variable
from lightning_ray.errors import ConfigError
from lightning_ray.jobs import STEP, Job, check_runs_dir, resuming, training


@pytest.mark.parametrize(
    ("entrypoint", "arguments"),
    [
        ("lightning-ray train examples/sql --name sql", ["examples/sql", "--name", "sql"]),
        ("env/bin/lightning-ray train x -- --set 'a b'", ["x", "--", "--set", "a b"]),
        ("A=1 python -m lightning_ray.cli train x", ["x"]),
        ("lightning-ray eval examples/sql", None),
        ("python train.py", None),
        ("echo 'unbalanced", None),
        ("", None),
    ],
)
def test_an_entrypoint_says_what_it_trains(entrypoint: str, arguments: list[str] | None) -> None:
    assert training(entrypoint) == arguments


@pytest.mark.parametrize(
    ("given", "resumed"),
    [
        (["x"], ["x", "--resume"]),
        (["x", "--resume", "--name", "n"], ["x", "--name", "n", "--resume"]),
        (["x", "--", "--resume", "y"], ["x", "--resume", "--", "--resume", "y"]),
    ],
)
def test_the_same_is_resumed(given: list[str], resumed: list[str]) -> None:
    assert resuming(given) == resumed and resuming(resumed) == resumed


def test_what_train_takes_is_handed_on_whole() -> None:
    words = ["x", "--name", "n", "--runs-dir", "s3://b/r", "--resume", "--set", "a=1", "--set", "b=[1, 2]"]
    given = parser().parse_args(["submit", *words, "--address", "http://head:8265", "--env", "A=b"])
    assert training_arguments(given, ["--set", "mine"]) == [*words, "--", "--set", "mine"]
    assert training_arguments(
        argparse.Namespace(path=Path("x"), name=None, runs_dir=None, resume=False, set=[]), []
    ) == ["x"]


@pytest.mark.parametrize(
    "given", [["x"], ["x", "--runs-dir", "runs"], ["x", "--", "--runs-dir", "/r"], ["--runs-dir=r"]]
)
def test_a_run_in_the_jobs_own_copy_is_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--runs-dir r?u?n?s?: .*Ray removes; give .*s3://bucket/runs"):
        check_runs_dir(given)


@pytest.mark.parametrize("given", [["x", "--runs-dir", "/shared/runs"], ["x", "--runs-dir=s3://b/r", "--", "y"]])
def test_a_run_that_outlives_its_job_is_not(given: list[str]) -> None:
    check_runs_dir(given)


def test_variables_have_their_values_or_those_of_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "1=2")
    assert variable("A=b=c") == ("A", "b=c") and variable("HERE") == ("HERE", "1=2") and variable("A=") == ("A", "")
    with pytest.raises(ConfigError, match="--env NOWHERE: there is no such variable here"):
        variable("NOWHERE")


def test_a_log_tells_how_far_a_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines are those that a run prints where there is no terminal."""
    import io

    from rich.console import Console

    from lightning_ray.progress import Reporter

    log = io.StringIO()
    reporter = Reporter(Console(file=log, width=80))
    reporter.start_steps(0, 12)
    for step, reward in enumerate((0.25, None)):
        reporter.step({"step": step, "reward": reward, "sampled_tokens_per_s": 5.0}, None)
    assert STEP.findall(log.getvalue()) == [("1", "12", "0.25"), ("2", "12", "-")]
    jobs = [
        Job("raysubmit_1", "STOPPED", "lightning-ray train x --name sql", 0.0, 1, 12, 0.25),
        Job("raysubmit_2", "RUNNING", "lightning-ray train examples/sql", resumes="raysubmit_1"),
    ]
    assert [job.run for job in jobs] == ["sql", "examples/sql"] and [job.ended for job in jobs] == [True, False]
    show(jobs)
    told = capsys.readouterr().out
    assert "1/12" in told and "0.25" in told and told.count("raysubmit_1") == 2


def test_a_cluster_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert main(["jobs", "--address", "http://127.0.0.1:9"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: no job server at http://127.0.0.1:9: ") and told.count("\n") == 1
    assert main(["submit", "x"]) == 2 and "Ray removes" in capsys.readouterr().err
