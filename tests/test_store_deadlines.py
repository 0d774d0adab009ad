"""The watchdog's deadlines: who is looked at, in which order, and when the clock is set back."""

from __future__ import annotations

from lightning_ray.store.deadlines import Deadlines

Pair = tuple[str, str]


def looked(deadlines: Deadlines, now: float, again: float | None = None) -> list[Pair]:
    seen: list[Pair] = []

    def look(*pair: str) -> float | None:
        seen.append(pair)  # type: ignore[arg-type]
        return again

    deadlines.tick(now, look)
    return seen


def test_only_those_whose_time_has_come_are_looked_at_and_the_oldest_first() -> None:
    deadlines = Deadlines()
    for name, at in (("first", 5.0), ("second", 3.0), ("late", 9.0), ("never", None)):
        deadlines.watch(name, "at", at)
    assert looked(deadlines, 2.9) == []
    assert looked(deadlines, 5.0) == [("first", "at"), ("second", "at")]
    assert looked(deadlines, 8.0) == []
    assert looked(deadlines, 100.0) == [("late", "at")]


def test_one_whose_deadline_has_moved_is_looked_at_again_in_its_old_place() -> None:
    deadlines = Deadlines()
    deadlines.watch("moved", "at", 1.0)
    assert looked(deadlines, 1.0, again=4.0) == [("moved", "at")]
    deadlines.watch("other", "at", 4.0)
    assert looked(deadlines, 3.9) == []
    assert looked(deadlines, 4.0) == [("moved", "at"), ("other", "at")]


def test_a_look_that_gives_a_time_that_is_past_is_not_repeated_at_once() -> None:
    deadlines = Deadlines()
    deadlines.watch("a", "at", 1.0)
    assert looked(deadlines, 2.0, again=1.5) == [("a", "at")]
    assert looked(deadlines, 2.0) == [("a", "at")]


def test_another_time_replaces_the_one_before() -> None:
    deadlines = Deadlines()
    deadlines.watch("sooner", "at", 100.0)
    deadlines.watch("sooner", "at", 2.0)
    deadlines.watch("not any more", "at", 2.0)
    deadlines.watch("not any more", "at", None)
    assert looked(deadlines, 3.0) == [("sooner", "at")]
    assert looked(deadlines, 200.0) == []


def test_all_are_looked_at_when_the_clock_was_set_back() -> None:
    deadlines = Deadlines()
    deadlines.watch("a", "at", 2000.0)
    assert looked(deadlines, 1000.0) == []
    assert looked(deadlines, 10.0, again=15.0) == [("a", "at")]
    assert looked(deadlines, 14.0) == []
    assert looked(deadlines, 15.0) == [("a", "at")]
