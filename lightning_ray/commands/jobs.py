"""``lightning-ray submit``, ``jobs``, ``stop`` and ``resume``: runs as jobs of a Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import ConfigError

if TYPE_CHECKING:
    from lightning_ray.jobs import Job, Jobs

WIDTH = 110


def add_job_commands(commands: Any, add_training_arguments: Any) -> None:
    """Declare the commands; ``add_training_arguments`` declares those of ``train``."""
    submit = commands.add_parser(
        "submit",
        help="train as a job of a Ray cluster",
        usage="lightning-ray submit PATH --runs-dir DIR [--name NAME] [--resume] [--set KEY=VALUE]... [--address URL] "
        "[--working-dir DIR] [--env NAME[=VALUE]]... [--follow] [-- ARGUMENTS]",
        description="Submit `lightning-ray train PATH ...` as a Ray job, with a copy of the working directory (without "
        ".git, .venv, runs and what .gitignore names); prints the job's id.",
    )
    add_training_arguments(submit)
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the job, by default with its value here; the dashboard shows it",
    )
    _add_working_dir(submit)
    resume = commands.add_parser("resume", help="submit a job that has ended anew, with --resume")
    resume.add_argument("job", metavar="JOB", help="its id")
    _add_working_dir(resume)
    stop = commands.add_parser("stop", help="stop a job: it saves a checkpoint and ends")
    stop.add_argument("job", metavar="JOB", help="its id")
    listed = commands.add_parser("jobs", help="list the jobs that train: run, state, step, reward")
    for command in (submit, resume, stop, listed):
        command.add_argument(
            "--address", metavar="URL", help="of the cluster's dashboard, http://HEAD:8265 (default: as Ray's own)"
        )


def _add_working_dir(command: Any) -> None:
    command.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="what the job gets a copy of (default: .)"
    )
    command.add_argument("--follow", action="store_true", help="print the job's log until it ends")


def job_command(given: argparse.Namespace, script: Sequence[str]) -> int:
    """Run one of the commands. Raises ConfigError and InfrastructureError for what the user can mend."""
    from lightning_ray.jobs import Jobs, check_runs_dir

    if given.command == "submit":
        arguments = training_arguments(given, script)
        check_runs_dir(arguments)
        variables = dict(map(variable, given.env))
        jobs = Jobs(given.address)
        return told(jobs, jobs.submit(arguments, given.working_dir.absolute(), variables), given.follow)
    jobs = Jobs(given.address)
    if given.command == "resume":
        return told(jobs, jobs.resume(given.job, given.working_dir.absolute()), given.follow)
    if given.command == "stop":
        job = jobs.stop(given.job)
        further = f"; lightning-ray resume {job.id} goes on with it" if job.state != "SUCCEEDED" else ""
        print(f"{job.id} {job.state} after step {job.step or 0}{further}")
        return 0
    show(jobs.all())
    return 0


def training_arguments(given: argparse.Namespace, script: Sequence[str]) -> list[str]:
    """What is handed on to ``lightning-ray train``."""
    arguments = [str(given.path)]
    for option, value in (("--name", given.name), ("--runs-dir", given.runs_dir)):
        arguments += [] if value is None else [option, value]
    arguments += ["--resume"] * given.resume
    for setting in given.set:
        arguments += ["--set", setting]
    return [*arguments, "--", *script] if script else arguments


def variable(text: str) -> tuple[str, str]:
    """``NAME=VALUE``, or ``NAME`` with the value that it has here. Raises ConfigError if it has none."""
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise ConfigError(f"--env {name}: there is no such variable here; give --env {name}=VALUE")
    return name, value if equals else os.environ[name]


def told(jobs: Jobs, job: str, follow: bool) -> int:
    """Print a submitted job's id, and its log if that is asked for; its failure is the command's."""
    print(job, flush=True)
    if not follow:
        return 0
    ended = asyncio.run(jobs.follow(job))
    print(f"{job} {ended.state}", file=sys.stderr)
    return 0 if ended.state == "SUCCEEDED" else 1


def show(jobs: Sequence[Job]) -> None:
    """A table, the newest last."""
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "run", "state", "step", "reward", "started", "goes on with")
    for job in jobs:
        began = "" if job.started is None else time.strftime("%m-%d %H:%M", time.localtime(job.started))
        step = "" if job.step is None else f"{job.step}/{job.steps}"
        reward = "" if job.reward is None else f"{job.reward:.2f}"
        table.add_row(job.id, job.run, job.state, step, reward, began, job.resumes or "")
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(table)
