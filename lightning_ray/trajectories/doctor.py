"""The doctor: what became of every rollout of a run, and why some gave no training data.

The verdicts are ``account``'s own, on the groups and steps that the run recorded. Every rollout has exactly one:
trained, or a reason; remarks tell of oddities that leave nobody out. How it looks is left to ``doctor_command``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from lightning_ray.trajectories.account import Account, settle
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.trajectories.evidence import Evidence, evidence_of
from lightning_ray.trajectories.given import settle_given
from lightning_ray.trajectories.keeping import keep_best
from lightning_ray.trajectories.prefix import Break, find_breaks
from lightning_ray.trajectories.remarks import Remark, detail_of, finer_reason, remarks_on
from lightning_ray.trajectories.run_steps import group_of, parts_of, settled_steps
from lightning_ray.trajectories.settings import BatchSettings, Keep
from lightning_ray.trajectories.step_accounts import TRAINED, StepAccount, step_accounts
from lightning_ray.trajectories.usable import outcome_of
from lightning_ray.types import TERMINAL_ROLLOUT, Attempt, AttemptedRollout, Rollout

FINER = dict.fromkeys(("no_token_ids", "calls_broken_off", "calls_failed"), "no_model_call")
"""Reasons that say more than the account's, which they stand for."""


class View(Protocol):
    """What of a store's folder is needed."""

    def query_rollouts(self) -> Iterable[Rollout]: ...

    def query_attempts(self, rollout_id: str) -> Iterable[Attempt]: ...

    def scan_spans(self, rollout_ids: Sequence[str]) -> pa.Table: ...


@dataclass(frozen=True)
class Diagnosis:
    """What became of one rollout. ``step`` is None for those that no step was settled with."""

    rollout_id: str
    reason: str
    detail: str | None = None
    group_id: str | None = None
    step: int | None = None
    remarks: tuple[Remark, ...] = ()
    breaks: tuple[Break, ...] = field(default=(), repr=False)

    @property
    def account_reason(self) -> str:
        """The reason in the words of the run's account."""
        return FINER.get(self.reason, self.reason)


@dataclass(frozen=True)
class Facts:
    """What a run's folder tells beside its store. ``steps`` are the training lines of metrics.jsonl, in order, with
    what steps.jsonl tells of each: its ``groups``, the ``version`` that it trained, and the ``advantages`` that an
    algorithm gave. None if there is no telling which steps were settled.
    """

    steps: Sequence[Mapping[str, Any]] | None = None
    batch: BatchSettings = field(default_factory=BatchSettings)
    keep: Keep | None = None
    """Which rollouts were imitated, if they were not compared within their groups."""
    max_staleness: int | None = None
    agent_match: str | None = None
    policy: str | None = None
    """Of which of several policies this is."""


@dataclass(frozen=True)
class Report:
    """All diagnoses, in order of the rollouts' creation, and where they contradict the run's own account."""

    diagnoses: list[Diagnosis]
    contradictions: list[str]
    steps: list[StepAccount] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rollouts by reason, most first; ``trained`` is the first."""
        counts = Counter(each.reason for each in self.diagnoses)
        return dict(sorted(counts.items(), key=lambda item: (item[0] != TRAINED, -item[1], item[0])))

    def remarks(self) -> dict[str, int]:
        """Rollouts by remark, most first."""
        kinds = Counter(kind for each in self.diagnoses for kind in {remark.kind for remark in each.remarks})
        return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def examine(view: View, facts: Facts, rollout_id: str | None = None, step: int | None = None) -> Report:
    """Diagnose the rollouts of a run, of one step, or one rollout (on which its whole step is looked at)."""
    rollouts = sorted(view.query_rollouts(), key=lambda rollout: rollout.start_time)
    steps = settled_steps(rollouts, facts.steps)
    parts = parts_of(rollouts, steps)
    wanted = [
        (number, part)
        for number, part in parts
        if (step is None or number == step)
        and (rollout_id is None or any(rollout.rollout_id == rollout_id for rollout in part))
    ]
    found: dict[str, Diagnosis] = {}
    contradictions = []
    for number, part in wanted:
        diagnoses = _diagnose(view, facts, number, part)
        found.update({each.rollout_id: each for each in diagnoses})
        if number is not None:
            contradictions += contradiction(number, diagnoses, facts.steps or ())
    kept = [rollout.rollout_id for rollout in rollouts if rollout.rollout_id in found]
    chosen = kept if rollout_id is None else [rollout_id] * (rollout_id in found)
    accounts = step_accounts(found.values(), facts.steps or ())
    return Report([found[each] for each in chosen], contradictions, accounts)


def _diagnose(view: View, facts: Facts, step: int | None, rollouts: Sequence[Rollout]) -> list[Diagnosis]:
    spans = view.scan_spans([rollout.rollout_id for rollout in rollouts]).combine_chunks()
    last = {r.rollout_id: r.attempt.attempt_id for r in rollouts if isinstance(r, AttemptedRollout)}
    episodes = read_episodes(rollouts, spans, last, facts.agent_match, facts.policy)
    evidence = evidence_of(spans, last, facts.agent_match, facts.policy)
    for rollout in rollouts:
        if isinstance(rollout, AttemptedRollout) and rollout.attempt.sequence_id > 1:
            given_up = [each for each in view.query_attempts(rollout.rollout_id) if each != rollout.attempt]
            known = evidence.get(rollout.rollout_id, Evidence())
            evidence[rollout.rollout_id] = replace(known, given_up=given_up)
    verdicts = _verdicts(episodes, facts, step)
    return [_diagnosis(episode, verdicts, evidence.get(episode.rollout_id, Evidence()), step) for episode in episodes]


@dataclass
class Verdicts:
    """Of some rollouts, by id."""

    reasons: dict[str, str] = field(default_factory=dict)
    """``trained`` or why not, in the account's words."""
    details: dict[str, str] = field(default_factory=dict)
    """Figures of the reason."""
    account: Account = field(default_factory=Account)
    """Of those that were settled."""

    def judge(self, episode: Episode, facts: Facts, otherwise: str) -> None:
        """One that nothing was settled with: why it could not be, or ``otherwise``."""
        if episode.rollout.status not in TERMINAL_ROLLOUT:
            self.reasons[episode.rollout_id] = "at_work"
            return
        outcome = outcome_of(episode, facts.batch)
        self.reasons[episode.rollout_id] = outcome.reason or otherwise
        if outcome.detail is not None:
            self.details[episode.rollout_id] = outcome.detail

    def settle(
        self,
        episodes: Sequence[Episode],
        facts: Facts,
        oldest_version: int | None,
        advantages: Mapping[str, float] | None = None,
    ) -> None:
        """Settle whole groups, or as the algorithm gave advantages."""
        groups = {episode.rollout_id: str(group_of(episode.rollout)) for episode in episodes}
        if advantages is not None:
            self.account = settle_given(episodes, advantages, facts.batch, oldest_version)
        elif facts.keep is None:
            self.account = settle(episodes, groups, facts.batch, oldest_version)
        else:
            self.account = keep_best(episodes, groups, facts.keep, facts.batch, oldest_version)
        self.reasons.update(self.account.dropped)
        self.reasons.update({episode.rollout_id: TRAINED for episode in self.account.trained})
        self.details.update(self.account.details)


def _verdicts(episodes: Sequence[Episode], facts: Facts, step: int | None) -> Verdicts:
    verdicts = Verdicts()
    groups: defaultdict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        if episode.rollout.mode in ("val", "test"):
            verdicts.reasons[episode.rollout_id] = "evaluation"
        elif (group := group_of(episode.rollout)) is not None:
            groups[group].append(episode)
        else:
            verdicts.judge(episode, facts, "usable")
    if step is None:
        for group, members in list(groups.items()):
            open_ = any(member.rollout.status not in TERMINAL_ROLLOUT for member in members)
            if facts.steps is not None or open_:
                for member in groups.pop(group):
                    verdicts.judge(member, facts, "not_settled")
    together = [member for members in groups.values() for member in members]
    oldest = None
    if facts.max_staleness is not None and step is not None:
        queued = max(((e.rollout.metadata or {}).get("weight_version", 0) for e in together), default=0)
        versions = {line["step"]: line.get("version") for line in facts.steps or ()}
        trained = versions[step]
        oldest = (queued if trained is None else trained) - facts.max_staleness
    given = {line["step"]: line.get("advantages") for line in facts.steps or ()}
    verdicts.settle(together, facts, oldest, None if step is None else given[step])
    return verdicts


def _diagnosis(episode: Episode, verdicts: Verdicts, evidence: Evidence, step: int | None) -> Diagnosis:
    rollout_id = episode.rollout_id
    reason = verdicts.reasons[rollout_id]
    if reason == "no_model_call":
        reason = finer_reason(evidence)
    breaks = find_breaks(evidence.calls) if len(episode.trajectories) > 1 else []
    return Diagnosis(
        rollout_id,
        reason,
        detail_of(episode, reason, evidence) or verdicts.details.get(rollout_id),
        group_of(episode.rollout),
        step,
        tuple(remarks_on(episode, evidence, breaks, verdicts.account)),
        tuple(breaks),
    )


def contradiction(step: int, diagnoses: Sequence[Diagnosis], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words, where the diagnoses of a step differ from its line in metrics.jsonl."""
    line = next(line for line in lines if line["step"] == step)
    counts = Counter(each.account_reason for each in diagnoses)
    told = Counter({name.removeprefix("dropped."): n for name, n in line.items() if name.startswith("dropped.")})
    told[TRAINED] = line["rollouts_trained"]
    differing = sorted(reason for reason in counts | told if counts[reason] != told[reason])
    return [f"step {step}: {reason} {counts[reason]} here, {told[reason]} in metrics.jsonl" for reason in differing]
