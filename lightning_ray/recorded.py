"""Rollouts that a run recorded, read back from its folder: the training ones that succeeded, task by task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import PROGRESS, STATE, tokenizer_hash
from lightning_ray.run.folder import RunFolder
from lightning_ray.store.view import open_folder
from lightning_ray.trajectories.episode import Episode, last_attempts, read_episodes
from lightning_ray.types import Attempt, Rollout

PORTION = 512
"""Rollouts whose spans are held at once."""


class View(Protocol):
    """What of a store's folder is needed."""

    def query_rollouts(self, where: Mapping[str, Any] | None = None) -> Iterable[Rollout]: ...

    def query_attempts(self, rollout_id: str) -> Iterable[Attempt]: ...

    def scan_spans(self, rollout_ids: Sequence[str]) -> pa.Table: ...


@dataclass(frozen=True)
class Recorded:
    """A portion of a run's rollouts, with all their spans."""

    rollouts: list[Rollout]
    spans: pa.Table
    attempts: dict[str, str]
    """The attempt that counts for each rollout."""

    def episodes(self, agent_match: str | None = None, policy: str | None = None) -> list[Episode]:
        """In their order; see ``read_episodes``."""
        return read_episodes(self.rollouts, self.spans, self.attempts, agent_match, policy)


def open_run(folder: Path) -> View:
    """The store of a run's folder, or a store's own. Raises StoreError if there is none."""
    return open_folder(folder / "store" if (folder / "store").is_dir() else folder)


def read_recorded(view: View, chosen: Container[str] | None = None) -> Iterator[Recorded]:
    """The rollouts that were played for training, or for nothing else, and succeeded; in order of their creation. With
    ``chosen``, those of these ids alone.
    """
    found = [rollout for rollout in view.query_rollouts() if rollout.status == "succeeded"]
    if chosen is not None:
        found = [rollout for rollout in found if rollout.rollout_id in chosen]
    rollouts = sorted((each for each in found if each.mode in (None, "train")), key=lambda each: each.start_time)
    for first in range(0, len(rollouts), PORTION):
        portion = rollouts[first : first + PORTION]
        spans = view.scan_spans([rollout.rollout_id for rollout in portion])
        yield Recorded(portion, spans, counting_attempts(spans, view.query_attempts))


def counting_attempts(spans: pa.Table, query_attempts: Callable[[str], Iterable[Attempt]]) -> dict[str, str]:
    """The attempt that counts for each rollout: the one with spans, of several the last."""
    pairs = set(zip(spans["rollout_id"].to_pylist(), spans["attempt_id"].to_pylist(), strict=True))
    counting = dict(pairs)
    for rollout_id, times in Counter(rollout_id for rollout_id, _ in pairs).items():
        if times > 1:
            counting |= last_attempts(list(query_attempts(rollout_id)))
    return counting


def task_of(rollout: Rollout) -> str:
    """The same for rollouts of one task, in whatever group and step."""
    return json.dumps(rollout.input, sort_keys=True, default=repr)


def check_same_tokenizer(run: RunFolder, model: Path) -> None:
    """Raises ConfigError if the run is known to have had another tokenizer than the model: its ids are other words."""
    latest = run.latest_checkpoint()
    progress = None if latest is None else run.part(latest) / STATE / PROGRESS
    if progress is None or not progress.is_file():
        return
    recorded, own = json.loads(progress.read_text()).get("tokenizer"), tokenizer_hash(model)
    if recorded not in (None, own):
        raise ConfigError(
            f"{run.path} was played with another tokenizer (sha256 {recorded[:12]}) than the model {model} has "
            f"({own[:12]}): its token ids are other words. Train the model that the run had, or export the run's "
            "conversations (lightning-ray export) and give their file, which is tokenized anew"
        )
