"""``lightning-ray eval``: a training script's agent on its tasks, with a run's model, a folder's or an endpoint's.

The script is run as ``lightning-ray train`` runs it, but its ``Trainer.fit`` evaluates. Two evaluations are compared
task by task; those that were played before need no script.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.commands.replay import stdout_on_stderr
from lightning_ray.config import build
from lightning_ray.errors import ConfigError
from lightning_ray.launch import Launch, parse_setting
from lightning_ray.mirror import is_url
from lightning_ray.relay.settings import Upstream

if TYPE_CHECKING:
    from lightning_ray.evaluation.comparison import Comparison
    from lightning_ray.evaluation.report import EvaluationReport
    from lightning_ray.evaluation.subject import Of

RunScript = Callable[[Path, Launch, list[str]], None]
WIDTH = 110
HERE = "evaluation", "endpoint"
"""Of the settings that ``--set`` reaches, those that are not the script's."""


def add_eval_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "eval",
        help="evaluate a run, a model or an endpoint with a training script's agent and tasks",
        usage="lightning-ray eval PATH [--run RUN | --model FOLDER | --endpoint URL] [--against OTHER] "
        "[--set KEY=VALUE]... [--json] [-- ARGUMENTS]",
        description="Play a script's agent on its tasks and tell the mean reward with an interval, pass@k, failures, "
        "tokens and cost. By default of the script's own run: its latest checkpoint, or the model it begins with.",
    )
    command.add_argument(
        "path", type=Path, help="a training script or its folder; or, with --against, the folder of an evaluation"
    )
    subject = command.add_mutually_exclusive_group()
    subject.add_argument("--run", help="a run: its folder or URL, or its name in runs/")
    subject.add_argument("--model", metavar="FOLDER", help="a checkpoint, or any Hugging Face model folder")
    subject.add_argument("--endpoint", metavar="URL", help="an OpenAI- or Anthropic-compatible endpoint")
    command.add_argument("--checkpoint", metavar="WHICH", help="of the run: latest (default), best, initial, or a step")
    command.add_argument("--endpoint-model", metavar="NAME", help="the model to ask the endpoint for")
    command.add_argument("--key-env", metavar="VARIABLE", help="the environment variable with the endpoint's key")
    command.add_argument(
        "--against",
        metavar="OTHER",
        help="compare with a run (as RUN@best), a model, or an evaluation's folder",
    )
    command.add_argument("--split", choices=("val", "test", "train"), help="of the tasks (default: the first there is)")
    command.add_argument("--tasks", type=int, metavar="N", help="only the first N")
    command.add_argument("--samples", type=int, default=1, metavar="N", help="rollouts of each task (default: 1)")
    command.add_argument("--sampling", choices=("greedy", "sampled", "agent"), help="how the model answers")
    command.add_argument("--name", help="of the evaluation: its folder is runs/NAME")
    command.add_argument("--runs-dir", help="where the folder is made, or a URL (default: as the script says)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting: evaluation.KEY, endpoint.KEY, or the script's",
    )
    command.add_argument("--json", action="store_true", help="one JSON object")


def evaluate_command(given: argparse.Namespace, arguments: list[str], run_script: RunScript) -> int:
    """Run the command. Raises ConfigError for what the user can mend."""
    from lightning_ray.evaluation.report import FILE, read_report

    if (given.path / FILE).is_file():
        if given.against is None:
            raise ConfigError(f"{given.path} is an evaluation: give --against another to compare it with")
        return tell(given, [read_report(given.path), read_report(Path(given.against))])
    with stdout_on_stderr():
        reports = play(given, arguments, run_script)
    return tell(given, reports)


def play(given: argparse.Namespace, arguments: list[str], run_script: RunScript) -> list[EvaluationReport]:
    """Have the script evaluate; returns one report, or two to be compared."""
    from lightning_ray.evaluation.report import FILE, read_report
    from lightning_ray.evaluation.request import Evaluated, EvaluationRequest
    from lightning_ray.evaluation.settings import EvaluationSettings

    settings = dict(parse_setting(text) for text in given.set)
    own: dict[str, dict[str, Any]] = {head: {} for head in HERE}
    for key in list(settings):
        head, _, rest = key.partition(".")
        if head in HERE:
            own[head][rest] = settings.pop(key)
    values = {"samples": given.samples, "sampling": given.sampling} | own["evaluation"]
    if given.tasks is not None and given.tasks < 1:
        raise ConfigError(f"--tasks {given.tasks}: give a whole number of at least 1")
    before = given.against is not None and (Path(given.against) / FILE).is_file()
    earlier = [read_report(Path(given.against))] if before else []
    of = [subject(given, own["endpoint"])]
    if given.against is not None and not before:
        of.append(named(given.against, given.runs_dir))
    request = EvaluationRequest(
        of, build(EvaluationSettings, values, "evaluation"), given.split, given.tasks, given.name
    )
    try:
        run_script(given.path, Launch(runs_dir=given.runs_dir, settings=settings, evaluation=request), arguments)
    except Evaluated:
        return request.reports + earlier
    raise ConfigError(f"{given.path} ended without calling Trainer.fit, which tells the agent and the tasks")


def subject(given: argparse.Namespace, endpoint: dict[str, Any]) -> Of:
    """What the arguments name; None for the script's own."""
    if given.endpoint is None and (endpoint or given.endpoint_model or given.key_env):
        raise ConfigError("--endpoint-model, --key-env and --set endpoint.KEY belong to --endpoint URL")
    if given.checkpoint is not None and given.run is None:
        raise ConfigError(f"--checkpoint {given.checkpoint} is of a run: give --run RUN")
    if given.endpoint is not None:
        values = {"base_url": given.endpoint, "model": given.endpoint_model, "api_key_env": given.key_env} | endpoint
        return build(Upstream, values, "endpoint")
    if given.run is not None:
        run = named(given.run, given.runs_dir)
        return run if given.checkpoint is None else f"{run}@{given.checkpoint}"
    return None if given.model is None else str(given.model)


def named(text: str, runs_dir: str | None) -> str:
    """A folder or URL as it is, or one of that name among the runs."""
    name, at, which = text.partition("@")
    if is_url(text) or Path(text).is_dir() or Path(name).is_dir():
        return text
    if is_url(among := runs_dir or "runs"):
        return f"{among.rstrip('/')}/{text}"
    return f"{Path(among) / name}{at}{which}" if (Path(among) / name).is_dir() else text


def tell(given: argparse.Namespace, reports: list[EvaluationReport]) -> int:
    """Tables or JSON on stdout."""
    from rich.console import Console

    from lightning_ray.evaluation.comparison import compare

    comparison: Comparison | None = compare(*reports) if len(reports) == 2 else None
    if given.json:
        told = [{"folder": str(report.folder), **report.as_dict()} for report in reports]
        whole = told[0] if comparison is None else {"reports": told, "comparison": comparison.as_dict()}
        print(json.dumps(whole, default=str))
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for report in reports:
        report.show(console)
        console.print(f"everything is in {report.folder}", markup=False, soft_wrap=True)
    if comparison is not None:
        comparison.show(console)
    return 0
