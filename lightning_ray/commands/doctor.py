"""``lightning-ray doctor``: what became of a run's rollouts, why some gave no training data, and what to do about it.

Reads the run's folder, at work or finished; nothing is asked of its processes, and nothing is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.commands.doctor_events import show_events
from lightning_ray.commands.doctor_steps import show_steps
from lightning_ray.commands.spans import add_folder_argument, store_folder
from lightning_ray.errors import ConfigError
from lightning_ray.run.events import read_events

if TYPE_CHECKING:
    from lightning_ray.run.folder import RunFolder
    from lightning_ray.trajectories.doctor import Diagnosis, Facts, Report
    from lightning_ray.trajectories.prefix import Break
    from lightning_ray.trajectories.settings import Keep

Decode = Callable[[Sequence[int]], str]
CAUSES = 3
"""Causes told of each reason, most frequent first."""
WIDTH = 110


def add_doctor_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "doctor",
        help="explain why rollouts gave no training data",
        description="Tell what became of every rollout of a run: trained on, or why not, and what to do about it.",
    )
    add_folder_argument(command, nargs="?")
    command.add_argument("--rollout", metavar="ID", help="all that is known of one rollout")
    command.add_argument("--step", type=int, metavar="N", help="only the rollouts of one training step, from 0")
    command.add_argument("--policy", metavar="NAME", help="of several policies (default: the first that is trained)")
    command.add_argument("--json", action="store_true", help="one JSON object, with every rollout")


def doctor(given: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError and StoreError for what the user can mend."""
    from rich.console import Console

    from lightning_ray.store.view import open_folder
    from lightning_ray.trajectories.doctor import examine

    store = store_folder(given.folder)
    run = store.parent if store.name == "store" else store
    facts = read_facts(run, given.policy)  # before the store, so that this has all of the steps that are told
    report = examine(open_folder(store), facts, given.rollout, given.step)
    if not report.diagnoses and given.rollout is not None:
        raise ConfigError(f"--rollout {given.rollout}: {store} has no such rollout")
    if not report.diagnoses and given.step is not None:
        known = [line["step"] for line in facts.steps or ()]
        told = f"settled steps are {known[0]} to {known[-1]}" if known else "no step is settled yet"
        raise ConfigError(f"--step {given.step}: there is no such step in {run}; {told}")
    try:
        if given.json:
            print(json.dumps(as_json(run, report)))
        else:
            broken = any(each.breaks for each in report.diagnoses)
            print_report(report, load_decode(run, policy=facts.policy) if broken else None, given.rollout is not None)
            if given.rollout is None:
                show_events(read_events(run), Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))
                show_steps(report.steps, given.step is not None, None if sys.stdout.isatty() else WIDTH)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has had enough, as in ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def read_facts(run: Path, policy: str | None = None) -> Facts:
    """What the run's folder tells, of one of several policies; a store alone tells nothing."""
    from lightning_ray.config import build
    from lightning_ray.run.folder import settings_in
    from lightning_ray.run.policy_folder import folder_of
    from lightning_ray.trajectories.doctor import Facts
    from lightning_ray.trajectories.settings import BatchSettings

    config = run / "config.json"
    if not config.is_file():
        return Facts()
    folder, settings = folder_of(run, policy, settings_in(run))
    lines = [line for line in folder.metrics() if line.get("kind") == "train"]
    settled = {
        step: {name: value for name, value in line.items() if name in ("version", "advantages")}
        | {"groups": [group_id for group_id, _ in line["groups"]]}
        for step, line in folder.steps().items()
    }
    lines = [line | settled.get(line["step"], {}) for line in lines]
    batch = build(BatchSettings, settings.get("batch") or {}, f"{config}: algorithm.batch")
    keep = keep_of(settings, folder)
    return Facts(lines, batch, keep, settings.get("max_staleness"), settings.get("agent_match"), folder.policy)


def keep_of(settings: Mapping[str, Any], run: RunFolder) -> Keep | None:
    """Which rollouts a run imitated, if it did. A filter of the user's own is what it did."""
    from lightning_ray.config import build
    from lightning_ray.trajectories.settings import Keep

    if settings.get("name") == "Distill" and not settings["reward_weight"]:
        return Keep()
    if "keep" not in settings:
        return None
    filtered = {rollout_id for line in run.steps().values() for rollout_id in line.get("filtered") or ()}
    values = settings["keep"] | {"filter": lambda episode: episode.rollout_id not in filtered}
    return build(Keep, values, f"{run.path / 'config.json'}: algorithm.keep")


def load_decode(run: Path, special: bool = True, policy: str | None = None) -> Decode | None:
    """Token ids to text, with or without special tokens, if the run's tokenizer is at hand."""
    from lightning_ray.run.folder import settings_in
    from lightning_ray.run.policy_folder import folder_of

    opened, settings = folder_of(run, policy, settings_in(run))
    latest, named = opened.latest_checkpoint(), settings.get("model")
    folders = [opened.model()]
    folders += [opened.part(latest)] if latest is not None else []
    folders += [Path(named)] if isinstance(named, str) else []
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            try:
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception:  # ids are told without their text
                return None
            return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=not special))
    return None


def as_json(run: Path, report: Report) -> dict[str, Any]:
    """The report as plain values; counts by reason add up to ``rollouts``."""
    from lightning_ray.trajectories.advice import ADVICE

    total = len(report.diagnoses)
    found = {**report.counts(), **report.remarks()}
    return {
        "run": str(run),
        "rollouts": total,
        "reasons": {reason: _entry(report, reason, n, total) for reason, n in report.counts().items()},
        "remarks": {kind: _entry(report, kind, n, total) for kind, n in report.remarks().items()},
        "advice": {name: ADVICE[name] for name in found if name in ADVICE},
        "contradictions": report.contradictions,
        "steps": [asdict(each) for each in report.steps],
        "diagnoses": [asdict(each) for each in report.diagnoses],
    }


def _entry(report: Report, name: str, count: int, total: int) -> dict[str, Any]:
    example = next(each for each in report.diagnoses if name in names_of(each))
    return {"rollouts": count, "share": count / total, "example": example.rollout_id}


def names_of(diagnosis: Diagnosis) -> set[str]:
    """The reason and the kinds of remarks."""
    return {diagnosis.reason, *(remark.kind for remark in diagnosis.remarks)}


def print_report(report: Report, decode: Decode | None, one: bool) -> None:
    """A table of reasons, one of remarks, and a paragraph for each; or all of one rollout."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDTH, highlight=False)
    if one:
        _print_rollout(console, report.diagnoses[0], decode)
        return
    total = len(report.diagnoses)
    if not total:
        console.print("There is no rollout yet.")
        return
    _print_table(console, f"{total} rollouts", "reason", report, report.counts())
    if report.remarks():
        _print_table(console, "remarks (they leave no rollout out)", "remark", report, report.remarks())
    for name in [*report.counts(), *report.remarks()]:
        if name != "trained":
            _print_paragraph(console, report, name, decode)
    for line in report.contradictions:
        console.print(f"The run counted otherwise: {line}", markup=False)


def _print_table(console: Any, title: str, what: str, report: Report, counts: Mapping[str, int]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(what)
    table.add_column("rollouts", justify="right")
    table.add_column("share", justify="right")
    table.add_column("example")
    total = len(report.diagnoses)
    for name, count in counts.items():
        entry = _entry(report, name, count, total)
        table.add_row(name, str(count), f"{entry['share']:.1%}", entry["example"])
    console.print(table)


def _print_paragraph(console: Any, report: Report, name: str, decode: Decode | None) -> None:
    from lightning_ray.trajectories.advice import ADVICE, UNKNOWN

    console.print(f"\n{name}", style="bold", markup=False)
    console.print(ADVICE.get(name, UNKNOWN), markup=False)
    having = [each for each in report.diagnoses if name in names_of(each)]
    details = [each.detail for each in having if each.reason == name and each.detail]
    for detail, count in Counter(short(detail) for detail in details).most_common(CAUSES):
        console.print(f"  {count} x {detail}", markup=False)
    remarks = [(each, remark) for each in having for remark in each.remarks if remark.kind == name]
    for diagnosis, remark in remarks[:1]:
        console.print(f"  {diagnosis.rollout_id}: {remark.text}", markup=False)
        if name == "prefix_broken":
            _print_text(console, next(b for b in diagnosis.breaks if b.place != "first_prompt"), decode)


def _print_text(console: Any, broken: Break, decode: Decode | None) -> None:
    if decode is not None:
        console.print(f"    had: {decode(broken.expected)!r}", markup=False)
        console.print(f"    got: {decode(broken.found)!r}", markup=False)


def _print_rollout(console: Any, diagnosis: Diagnosis, decode: Decode | None) -> None:
    from lightning_ray.trajectories.advice import ADVICE, UNKNOWN

    console.print(f"{diagnosis.rollout_id}: {diagnosis.reason}", style="bold", markup=False)
    for name in ("step", "group_id", "detail"):
        if (value := getattr(diagnosis, name)) is not None:
            console.print(f"  {name}: {value}", markup=False)
    if diagnosis.reason != "trained":
        console.print(ADVICE.get(diagnosis.reason, UNKNOWN), markup=False)
    breaks = iter([broken for broken in diagnosis.breaks if broken.place != "first_prompt"])
    for remark in diagnosis.remarks:
        console.print(f"  {remark.kind}: {remark.text}", markup=False)
        if remark.kind == "prefix_broken":
            _print_text(console, next(breaks), decode)
    for kind in dict.fromkeys(remark.kind for remark in diagnosis.remarks):
        console.print(f"\n{kind}", style="bold", markup=False)
        console.print(ADVICE.get(kind, UNKNOWN), markup=False)


def short(text: str, width: int = 160) -> str:
    """One line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
