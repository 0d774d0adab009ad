"""``lightning-ray export``: a run's good rollouts as a file of conversations, for fine-tuning here or elsewhere.

Reads the run's folder, at work or finished; nothing is changed there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_ray.commands.spans import add_folder_argument, store_folder
from lightning_ray.errors import ConfigError


def add_export_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "export",
        help="write a run's good rollouts as conversations",
        description="Write the training rollouts of a run as conversations, one a line (JSONL).",
    )
    add_folder_argument(command)
    command.add_argument("output", type=Path, metavar="OUT.jsonl", help="the file to write")
    command.add_argument(
        "--format",
        choices=("openai", "huggingface"),
        default="openai",
        help="OpenAI's chat fine-tuning (messages, tools), or a data set's columns (also reward and rollout_id)",
    )
    command.add_argument("--min-reward", type=float, metavar="X", help="only rollouts with at least this reward")
    command.add_argument("--top", type=float, default=1.0, metavar="SHARE", help="of each task the best, 0 to 1")
    command.add_argument("--agent", metavar="REGEX", help="only calls of agents in whose name it is found")
    command.add_argument("--policy", metavar="NAME", help="of several policies (default: the first that is trained)")
    command.add_argument("--tokens", action="store_true", help="columns token_ids and mask (huggingface only)")


def export_command(given: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError and StoreError for what the user can mend."""
    from lightning_ray.algorithms.weights import check_expression
    from lightning_ray.commands.doctor import load_decode, read_facts
    from lightning_ray.config import build
    from lightning_ray.export import export
    from lightning_ray.recorded import open_run
    from lightning_ray.trajectories.settings import Keep

    if given.tokens and given.format != "huggingface":
        raise ConfigError("--tokens: OpenAI's format has no place for them; add --format huggingface")
    if given.agent is not None:
        check_expression("--agent", given.agent)
    keep = build(Keep, {"top_share": given.top, "min_reward": given.min_reward}, "")
    store = store_folder(given.folder)
    run = store.parent if store.name == "store" else store
    decode = load_decode(run, special=False, policy=given.policy)
    facts = read_facts(run, given.policy)
    lines, counts = export(
        open_run(given.folder),
        given.format,
        keep,
        given.agent,
        decode,
        given.tokens,
        facts.batch.reward_weights,
        facts.policy,
    )
    write_lines(lines, given.output)
    left_out = "".join(f", {reason} {count}" for reason, count in sorted(counts.dropped.items()))
    print(
        f"{counts.conversations} conversations of {counts.kept} of {counts.rollouts} rollouts{left_out}: {given.output}"
    )
    if counts.without_messages:
        print(f"{counts.without_messages} more have no chat messages that could be told, and are not in it")
    if not counts.conversations:
        raise ConfigError(f"nothing of {given.folder} is exported; see --min-reward, --top and --agent")
    return 0


def write_lines(lines: Iterable[dict[str, Any]], output: Path) -> None:
    """Write JSONL, whole or not at all. Raises ConfigError if it cannot be written."""
    draft = output.with_name(f".{output.name}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        os.replace(draft, output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
