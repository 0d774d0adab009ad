"""The command line: ``lightning-ray train PATH``, ``eval PATH``, ``spans SQL``, ``doctor RUN``, ``jobs`` and others."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from lightning_ray.commands.dashboards import add_dashboards_command, dashboards
from lightning_ray.commands.doctor import add_doctor_command, doctor
from lightning_ray.commands.eval import add_eval_command, evaluate_command
from lightning_ray.commands.export import add_export_command, export_command
from lightning_ray.commands.jobs import add_job_commands, job_command
from lightning_ray.commands.replay import add_replay_command, replay
from lightning_ray.commands.spans import add_spans_command, spans
from lightning_ray.commands.traces import add_traces_command, traces
from lightning_ray.errors import ConfigError, LightningRayError
from lightning_ray.launch import Launch, launched, parse_setting

INTERRUPTED = 130
READING = {
    "spans": spans,
    "doctor": doctor,
    "replay": replay,
    "export": export_command,
    "dashboards": dashboards,
    "traces": traces,
}
"""Commands that start no run."""
JOBS = ("submit", "jobs", "stop", "resume")


def entry() -> None:
    """The process of the command.

    A run that was broken off may have left a thread in the midst of native code, which an orderly end of the
    interpreter would crash into; all that had to be ended has been by then.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of ours are one message on stderr, without a traceback."""
    own, script = split(sys.argv[1:] if arguments is None else arguments)
    given = parser().parse_args(own)
    reading = READING.get(given.command)
    try:
        if reading is not None:
            return reading(given)
        if given.command in JOBS:
            return job_command(given, script)
        return evaluate_command(given, script, run_script) if given.command == "eval" else train(given, script)
    except LightningRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if reading is None and not isinstance(error, ConfigError) else 2
    except KeyboardInterrupt:
        told = "interrupted; continue with --resume" if given.command == "train" else "interrupted"
        print(told, file=sys.stderr)
        return INTERRUPTED


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours and what, after ``--``, is the script's."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    top = argparse.ArgumentParser(prog="lightning-ray", description="Train any AI agent with reinforcement learning.")
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "train",
        help="run a training script, or the train.py of a folder",
        usage="lightning-ray train PATH [--name NAME] [--runs-dir DIR] [--resume] [--set KEY=VALUE]... [-- ARGUMENTS]",
    )
    add_training_arguments(command)
    add_job_commands(commands, add_training_arguments)
    add_eval_command(commands)
    add_spans_command(commands)
    add_doctor_command(commands)
    add_replay_command(commands)
    add_export_command(commands)
    add_dashboards_command(commands)
    add_traces_command(commands)
    return top


def add_training_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``train``, which ``submit`` has too."""
    command.add_argument("path", type=Path, help="a Python file that calls Trainer.fit, or a folder with a train.py")
    command.add_argument("--name", help="the run's name: its folder is runs/NAME")
    command.add_argument("--runs-dir", help="where the run's folder is made: a folder or a URL (default: runs)")
    command.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. algorithm.steps=5"
    )


def train(given: argparse.Namespace, arguments: list[str]) -> int:
    """Run the user's script with what the command line overrides."""
    launch = Launch(given.name, given.runs_dir, given.resume, dict(parse_setting(text) for text in given.set))
    run_script(given.path, launch, arguments)
    return 0


def run_script(path: Path, launch: Launch, arguments: list[str]) -> None:
    """Run a script, or the train.py of a folder, as ``__main__``; the Trainer in it follows ``launch``."""
    script = path / "train.py" if path.is_dir() else path
    if not script.is_file():
        raise ConfigError(f"{path}: no such training script; give a Python file, or a folder with a train.py")
    sys.argv = [str(script), *arguments]
    # As ``python -m`` does, so that a script finds its neighbours; Ray's workers get the same path.
    sys.path[:0] = [str(Path.cwd()), str(script.parent.resolve())]
    with launched(launch):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    entry()
