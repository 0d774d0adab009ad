"""Groups that cannot teach: what becomes of them, and which are played again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lightning_ray.trajectories.account import Account, settle
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.settings import BatchSettings, GroupPolicy
from tests.test_trajectories import episode

BROKEN = {"kind": "infrastructure", "reason": "gone"}


def failed(rollout_id: str, reward: float | None = None, kind: str = "infrastructure", calls: int = 1) -> Episode:
    return episode(rollout_id, reward, "failed", calls=calls, failure={"kind": kind, "reason": "gone"})


def account_of(*episodes: Episode, **policy: Any) -> Account:
    """Settled with groups by the first letter of the rollouts' ids."""
    groups = {each.rollout_id: each.rollout_id[0] for each in episodes}
    return settle(episodes, groups, BatchSettings(groups=GroupPolicy(**policy)))


def trained(account: Account) -> list[str]:
    return [each.rollout_id for each in account.trained]


GOOD = (episode("g0", 0.0), episode("g1", 1.0))


def test_a_group_of_one() -> None:
    lone = (*GOOD, episode("a0", 1.0), failed("a1", kind="failed"))
    told = {"a0": "group_of_one", "a1": "agent_failed"}
    account = account_of(*lone)
    assert (trained(account), account.dropped, account.resample) == (["g0", "g1"], told, [])
    account = account_of(*lone, alone="resample")
    assert (trained(account), account.dropped, account.resample) == (["g0", "g1"], told, ["a"])
    account = account_of(*lone, alone="keep")
    assert (trained(account), account.dropped) == (["g0", "g1", "a0"], {"a1": "agent_failed"})
    assert not account.resample


def test_a_group_of_none_is_played_again_as_one_of_one_is() -> None:
    none = (*GOOD, failed("a0", kind="failed"), episode("a1", None))
    for choice, again in (("drop", []), ("keep", []), ("resample", ["a"])):
        account = account_of(*none, alone=choice)
        assert account.dropped == {"a0": "agent_failed", "a1": "no_reward"} and account.resample == again


def test_a_group_without_variance() -> None:
    alike = (episode("a0", 0.5), episode("a1", 0.5), *GOOD)
    account = account_of(*alike)
    assert account.dropped == {"a0": "no_variance", "a1": "no_variance"} and not account.resample
    assert account.details["a0"] == "reward 0.5"
    account = account_of(*alike, no_variance="resample")
    assert (trained(account), account.resample) == (["g0", "g1"], ["a"]) and len(account.dropped) == 2
    account = account_of(*alike, no_variance="keep")
    assert trained(account) == ["a0", "a1", "g0", "g1"] and not account.dropped and not account.resample


def test_a_failure_of_the_infrastructure() -> None:
    group = (episode("a0", 0.0), episode("a1", 1.0), failed("a2", 0.5), failed("a3"), failed("a4", 0.5, "timeout"))
    left_out = {"a2": "infrastructure_failure", "a3": "infrastructure_failure", "a4": "timed_out"}
    account = account_of(*group)
    assert (trained(account), account.dropped, account.resample) == (["a0", "a1"], left_out, [])
    account = account_of(*group, infrastructure="keep")
    assert trained(account) == ["a0", "a1", "a2"]
    assert account.dropped == {"a3": "infrastructure_failure", "a4": "timed_out"}
    account = account_of(*group, *GOOD, infrastructure="resample")
    assert trained(account) == ["g0", "g1"] and account.resample == ["a"]
    assert account.dropped == {**left_out, "a0": "resampled", "a1": "resampled"}


def test_a_kept_failure_needs_tokens_and_a_reward() -> None:
    account = account_of(*GOOD, failed("g2", 1.0, calls=0), infrastructure="keep")
    assert account.dropped == {"g2": "infrastructure_failure"}


def test_the_policy_is_frozen() -> None:
    with pytest.raises(ValidationError):
        GroupPolicy().alone = "keep"  # type: ignore[misc]


def test_steps_that_differ_are_variance() -> None:
    from tests.test_batch_rewards import FIRST, SECOND, read, reward

    first, second = read(FIRST, reward(0.5, 2.0), SECOND, reward(1.0, 4.0)), read(FIRST, SECOND, reward(1.0, 4.0))
    second.rollout.rollout_id = "other"
    groups = {"ro": "g", "other": "g"}
    assert settle([first, second], groups).drops_by_reason() == {"no_variance": 2}
    assert len(settle([first, second], groups, BatchSettings(credit="step")).trained) == 2
    alike = [read(FIRST, reward(1.0, 2.0), SECOND, reward(1.0, 4.0)) for _ in range(2)]
    alike[1].rollout.rollout_id = "other"
    assert settle(alike, groups, BatchSettings(credit="step")).drops_by_reason() == {"no_variance": 2}


choices = st.sampled_from(["drop", "keep", "resample"])
members = st.builds(
    lambda group, reward, sampled, status: (group, reward, sampled, status),
    st.sampled_from("abc"),
    st.sampled_from([None, 0.0, 1.0, float("nan")]),
    st.integers(0, 9),
    st.sampled_from(["succeeded", "succeeded", "succeeded", "cancelled", "infrastructure", "failed"]),
)


@given(
    st.lists(members, max_size=12),
    st.builds(GroupPolicy, alone=choices, no_variance=choices, infrastructure=choices),
    st.sampled_from(["drop", "drop_rows", "truncate"]),
    st.integers(2, 12) | st.none(),
)
def test_every_rollout_is_trained_or_dropped_for_a_reason(
    given_members: list[Any], policy: GroupPolicy, choice: Any, limit: int | None
) -> None:
    episodes = []
    for number, (group, reward, sampled, status) in enumerate(given_members):
        failure = {"failure": BROKEN} if status == "infrastructure" else {}
        known = "failed" if failure else status
        episodes.append(episode(f"{group}{number}", reward, known, sampled, **failure))
    groups = {each.rollout_id: each.rollout_id[0] for each in episodes}
    account = settle(episodes, groups, BatchSettings(groups=policy, max_tokens=limit, on_too_long=choice))
    assert sorted([*trained(account), *account.dropped]) == sorted(groups)
    assert len(account.trained) + sum(account.drops_by_reason().values()) == len(episodes)
    assert account.figures()["rows"] == sum(len(each.trajectories) for each in account.trained)
    assert not {groups[each] for each in trained(account)} & {*account.resample}, "what is trained is not played again"
    assert len(set(account.resample)) == len(account.resample) and {*account.resample} <= {*groups.values()}
    if "resample" not in (policy.alone, policy.no_variance, policy.infrastructure):
        assert not account.resample and "resampled" not in account.dropped.values()
