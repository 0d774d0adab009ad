"""Slots bound the staleness, whatever the order in which groups end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.algorithms.flow import Group, GroupFlow


class Player:
    """Ends each group when it is told to."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.queued: list[Group] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []

    async def queue(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.queued.append(group)
            while len(group.rollout_ids) < self.size:
                name = f"{group.position}.{len(group.rollout_ids)}.{len(self.ends)}"
                group.rollout_ids.append(name)
                self.ends[name] = asyncio.Event()

    async def wait(self, rollout_ids: Sequence[str]) -> None:
        await asyncio.gather(*(self.ends[name].wait() for name in rollout_ids))

    async def ended(self, rollout_ids: Sequence[str]) -> list[str]:
        return [name for name in rollout_ids if self.ends[name].is_set()]

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        self.cancelled += [name for name in rollout_ids if not self.ends[name].is_set()]

    def end(self, group: Group) -> None:
        for name in group.rollout_ids:
            self.ends[name].set()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_without_staleness_a_step_takes_all_that_it_queued() -> None:
    player = Player()
    flow = GroupFlow(player, per_step=3, max_staleness=0, next_position=0, last=6)
    await flow.fill(0)
    assert [group.position for group in player.queued] == [0, 1, 2]
    taking = asyncio.create_task(flow.take(3, 0))
    for group in player.queued[::-1]:
        await settled()
        assert not taking.done()
        player.end(group)
    assert [group.position for group in await taking] == [0, 1, 2]
    await flow.fill(0)
    assert len(player.queued) == 3, "a slot is free only when its group was trained or dropped"


async def test_a_straggler_is_overtaken_and_waited_for_only_when_it_must_go() -> None:
    player = Player()
    flow = GroupFlow(player, per_step=2, max_staleness=1, next_position=0, last=100)
    await flow.fill(0)
    slow, *others = player.queued
    assert len(others) == 3
    for group in others:
        player.end(group)
    first = await flow.take(2, 0)
    assert [group.position for group in first] == [1, 2]
    flow.release(group.group_id for group in first)
    await flow.fill(1)
    for group in player.queued[4:]:
        player.end(group)
    taking = asyncio.create_task(flow.take(2, 1))
    await settled()
    assert not taking.done(), "the straggler of version 0 must not be trained after version 1"
    player.end(slow)
    assert [group.position for group in await taking] == [0, 3]


async def test_the_last_step_takes_what_there_is() -> None:
    player = Player()
    flow = GroupFlow(player, per_step=4, max_staleness=1, next_position=0, last=5)
    await flow.fill(0)
    assert len(player.queued) == 5
    for group in player.queued:
        player.end(group)
    first = await flow.take(4, 0)
    flow.release(group.group_id for group in first)
    await flow.fill(1)
    assert [group.position for group in await flow.take(4, 1)] == [4]


async def test_a_resume_keeps_what_had_ended_and_plays_the_rest_anew() -> None:
    player = Player()
    flow = GroupFlow(player, per_step=2, max_staleness=1, next_position=0, last=100)
    await flow.fill(0)
    one = player.queued[1]
    player.ends[one.rollout_ids[0]].set()
    state = await flow.state()
    assert state["next_position"] == 4 and [g["position"] for g in state["groups"]] == [0, 1, 2, 3]
    assert state["groups"][1]["rollout_ids"] == [one.rollout_ids[0]]
    await flow.stop()
    assert one.rollout_ids[1] in player.cancelled and one.rollout_ids[0] not in player.cancelled
    again = GroupFlow(player, 2, 1, state["next_position"], 100)
    await again.restore([Group(**group) for group in state["groups"]], 0)
    restored = player.queued[5]
    assert restored.rollout_ids[0] == one.rollout_ids[0] and restored.rollout_ids[1] != one.rollout_ids[1]
    assert again.busy == 4
    await again.stop()


async def steps(flow: GroupFlow, player: Player, per_step: int, count: int, version: int, seed: int) -> list[Group]:
    """Make so many steps, with groups that end in any order, from ``version`` on; returns what they took."""
    chance, taken = random.Random(seed), []
    for number in range(version, version + count):
        await flow.fill(number)
        taking = asyncio.create_task(flow.take(per_step, number))
        while not taking.done():
            if open_ := [g for g in player.queued if not all(player.ends[r].is_set() for r in g.rollout_ids)]:
                player.end(chance.choice(open_))
            await settled()
        assert len(taking.result()) == per_step
        taken += taking.result()
        flow.release(group.group_id for group in taking.result())
    return taken


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32))
def test_a_resume_may_change_the_bound_and_the_groups_of_a_step(
    per_step: int, staleness: int, other_per_step: int, other_staleness: int, seed: int
) -> None:
    async def run() -> None:
        before, after = Player(), Player()
        flow = GroupFlow(before, per_step, staleness, 0, 10_000)
        taken = await steps(flow, before, per_step, 4, 0, seed)
        state = await flow.state()
        await flow.stop()
        after.ends = before.ends
        again = GroupFlow(after, other_per_step, other_staleness, state["next_position"], 10_000)
        await again.restore([Group(**group) for group in state["groups"]], 4)
        unfinished = await again.state()
        assert {g["position"] for g in unfinished["groups"]} == {g["position"] for g in state["groups"]}
        more = await steps(again, after, other_per_step, 24, 4, seed)
        versions = [4 + index // other_per_step for index in range(len(more))]
        assert all(0 <= v - group.version <= other_staleness for v, group in zip(versions, more, strict=True))
        positions = [group.position for group in (*taken, *more)]
        assert len(positions) == len({*positions}) and {*range(state["next_position"])} <= {*positions}
        await again.stop()

    asyncio.run(run())


async def test_groups_that_are_played_again_keep_their_slots() -> None:
    player = Player()
    flow = GroupFlow(player, per_step=2, max_staleness=0, next_position=0, last=100)
    await flow.fill(0)
    for group in player.queued:
        player.end(group)
    first, _ = await flow.take(2, 0)
    flow.release([first.group_id])
    await flow.again([first.position], 0)
    assert flow.busy == flow.slots
    player.end(player.queued[-1])
    assert [group.position for group in await flow.take(1, 0)] == [first.position]


async def test_a_failed_wait_ends_the_step() -> None:
    class Failing(Player):
        async def wait(self, rollout_ids: Sequence[str]) -> None:
            raise TimeoutError("past the deadline")

    flow = GroupFlow(Failing(), 2, 0, 0, 100)
    await flow.fill(0)
    with pytest.raises(TimeoutError):
        await flow.take(2, 0)
    await flow.stop()


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32), st.floats(0, 0.5))
def test_no_group_is_trained_beyond_the_bound(per_step: int, staleness: int, seed: int, barren: float) -> None:
    """``barren`` steps train nothing, so that the version stays."""

    async def run() -> None:
        chance, player, version = random.Random(seed), Player(1), 0
        flow = GroupFlow(player, per_step, staleness, 0, 10_000)
        for _ in range(12):
            await flow.fill(version)
            assert flow.busy == flow.slots
            taking = asyncio.create_task(flow.take(per_step, version))
            while not taking.done():
                open_ = [g for g in player.queued if not player.ends[g.rollout_ids[0]].is_set()]
                if open_:
                    player.end(chance.choice(open_))
                await settled()
            taken = taking.result()
            assert len(taken) == per_step
            assert all(0 <= version - group.version <= staleness for group in taken)
            if chance.random() >= barren:
                version += 1
            flow.release(group.group_id for group in taken)
        await flow.stop()

    asyncio.run(run())
