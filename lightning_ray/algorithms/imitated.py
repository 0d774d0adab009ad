"""Rollouts and conversations that were not played by this run: read once, trained on step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.source import Played
from lightning_ray.conversations.files import Conversation, read_conversations
from lightning_ray.conversations.rendering import Renderer
from lightning_ray.data import Epochs
from lightning_ray.errors import ConfigError
from lightning_ray.recorded import check_same_tokenizer, open_run, read_recorded, task_of
from lightning_ray.run.folder import settings_in
from lightning_ray.run.policy_folder import folder_of
from lightning_ray.threads import in_thread
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.join import join_calls
from lightning_ray.types import Rollout

if TYPE_CHECKING:
    from lightning_ray.algorithms.sft import SFT
    from lightning_ray.run.run import Run

Groups = dict[str, list[Episode]]
"""By task."""


class ImitatedRollouts:
    """What ``settings.data`` holds. An epoch takes every task once, in an order of its own, in steps of
    ``settings.prompts_per_step``; its last step has what is left.
    """

    def __init__(self, settings: SFT, run: Run) -> None:
        self._settings = settings
        self._run = run
        self._groups: list[tuple[str, list[Episode]]] = []

    async def begin(self, keep: bool = True) -> None:
        """Read the data. Raises ConfigError if nothing of it would be trained on."""
        if not self._groups:
            with self._run.reporter.stage("data to imitate"):
                groups = await in_thread(read_data, self._settings, self._run.policy.model)
            self._groups = list(groups.items())

    async def collect(self, step: int) -> Played:
        """The step's rollouts, settled."""
        size, each = len(self._groups), self._settings.prompts_per_step or len(self._groups)
        epoch, place = divmod(step, -(-size // each))
        first = place * each
        groups = Epochs(self._groups, self._settings.seed).take(epoch * size + first, min(each, size - first))
        episodes = [episode for _, members in groups for episode in members]
        group_of = {episode.rollout_id: task for task, members in groups for episode in members}
        account = self._settings.settle(episodes, group_of, None)
        sampled_elsewhere = [replace(episode, sampled_tokens=0) for episode in episodes]
        return Played(sampled_elsewhere, group_of, [task for task, _ in groups], account, own=False)

    def release(self, played: Played) -> None:
        """Nothing is held."""

    async def state(self) -> dict[str, Any]:
        """A step's number tells it all."""
        return {}

    async def stop(self) -> None:
        """Nothing is on its way."""


def check_data(settings: SFT) -> None:
    """Raises ConfigError where there is no data or, as far as that shows before the model is there, none of use."""
    for path in settings.data:
        if path.is_dir():
            open_run(path)
            folder_of(path, settings.data_policy, settings_in(path))
        elif not path.is_file():
            raise ConfigError(f"data={str(path)!r} is not there; give the folder of a run, or a JSONL file")
        elif (first := next(read_conversations(path), None)) is None:
            raise ConfigError(f"data={str(path)!r} is empty; give conversations, one a line")
        elif isinstance(settings.model, str | Path):
            Renderer.of_model(Path(settings.model), settings.template_arguments).calls(first)


def read_data(settings: SFT, model: Path) -> Groups:
    """All of it, by task; each conversation is a task of its own. Raises ConfigError if nothing would be trained on."""
    groups: Groups = {}
    for path in settings.data:
        for task, episode in _recorded(path, settings, model) if path.is_dir() else _written(path, settings, model):
            groups.setdefault(task, []).append(episode)
    episodes = [episode for members in groups.values() for episode in members]
    group_of = {episode.rollout_id: task for task, members in groups.items() for episode in members}
    account = settings.settle(episodes, group_of, None)
    if not account.trained:
        raise ConfigError(
            f"data={[str(path) for path in settings.data]}: of its {len(episodes)} rollouts none is to be trained on: "
            f"{account.drops_by_reason()}; see keep and batch"
        )
    return groups


def _recorded(folder: Path, settings: SFT, model: Path) -> Iterator[tuple[str, Episode]]:
    run, _ = folder_of(folder, settings.data_policy, settings_in(folder))
    check_same_tokenizer(run, model)
    for portion in read_recorded(open_run(folder)):
        for episode in portion.episodes(settings.agent_match, run.policy):
            yield task_of(episode.rollout), episode


def _written(file: Path, settings: SFT, model: Path) -> Iterator[tuple[str, Episode]]:
    renderer = Renderer.of_model(model, settings.template_arguments)
    for number, conversation in enumerate(read_conversations(file)):
        yield conversation.where, episode_of(conversation, f"{file.name}-{number}", renderer)


def episode_of(conversation: Conversation, rollout_id: str, renderer: Renderer) -> Episode:
    """A conversation as if it had been played, without a reward."""
    calls = renderer.calls(conversation)
    rollout = Rollout(rollout_id=rollout_id, input=conversation.where, start_time=0.0, status="succeeded")
    return Episode(
        rollout,
        join_calls(calls),
        calls=len(calls),
        sampled_tokens=sum(len(call.sampled_ids) for call in calls),
        call_ids=[str(number) for number in range(len(calls))],
    )
