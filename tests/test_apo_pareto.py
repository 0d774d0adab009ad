"""The front of a prompt search, its lines of descent and their merges."""

from __future__ import annotations

from pathlib import Path

import lightning_ray as lr
from lightning_ray.algorithms.apo.candidates import Candidate, ancestors, common_ancestor
from lightning_ray.algorithms.apo.pareto import changed_by_one, pareto_front, wins
from tests.apo_parts import SMALL, search, state_of
from tests.scripted_model import ScriptedModel, wishes


def candidate(version: str, rewards: dict[int, float], *parents: str) -> Candidate:
    return Candidate(version=version, templates={}, rewards=rewards, parents=parents)


def test_the_front_keeps_what_is_best_somewhere() -> None:
    a, b = candidate("v1", {0: 1.0, 1: 0.0, 2: 0.5}), candidate("v2", {0: 0.0, 1: 1.0, 2: 0.5})
    worse, same = candidate("v3", {0: 0.5, 1: 0.0, 2: 0.5}), candidate("v4", {0: 1.0, 1: 0.0, 2: 0.5})
    assert pareto_front([a, b, worse, same]) == [a, b]
    assert wins([a, b]) == {"v1": 2, "v2": 2} and wins([a, worse])["v3"] == 2
    part_of = candidate("v5", {0: 1.0})
    assert pareto_front([a, part_of]) == [a, part_of], "what it was not played on does not count against it"


def test_lines_of_descent() -> None:
    pool = {
        each.version: each
        for each in (
            candidate("v0", {}),
            candidate("v1", {}, "v0"),
            candidate("v2", {}, "v1"),
            candidate("v3", {}, "v1"),
            candidate("v4", {}, "v2", "v3"),
        )
    }
    assert ancestors(pool, "v4") == set(pool) and common_ancestor(pool, "v2", "v3") == "v1"
    assert common_ancestor(pool, "v1", "v3") is None


def test_a_merge_takes_the_version_of_the_line_that_changed_it() -> None:
    def texts(**values: str) -> dict[str, lr.PromptTemplate]:
        return {name: lr.PromptTemplate(template=text) for name, text in values.items()}

    origin, first, second = texts(a="o", b="o", c="o"), texts(a="1", b="o", c="1"), texts(a="o", b="2", c="2")
    assert [changed_by_one(first, second, origin, name) for name in "abc"] == [first["a"], second["b"], None]


async def test_a_pareto_search_validates_only_what_beats_its_parent_and_merges_lines(tmp_path: Path) -> None:
    with ScriptedModel(wishes) as model:
        apo = lr.APO[str](model.client(), beam_rounds=6, selection="pareto", seed=1, **SMALL)
        await search(tmp_path, apo, ["red", "blue", "green", "red"], ["red", "blue", "green"])
    state = state_of(apo)
    assert state.best_score == 1.0 and set(apo.get_best_prompt().template.split()) >= {"red", "blue", "green"}
    edits = [each for each in state.candidates.values() if each.origin == "edit"]
    assert edits and all(each.trial is not None for each in edits)
    assert all(bool(each.rewards) == (each.trial[1] > each.trial[0]) for each in edits)
    merges = [each for each in state.candidates.values() if each.origin == "merge"]
    assert merges and model.asked("merge")
    for merge in merges:
        one, other = merge.parents
        assert common_ancestor(state.candidates, one, other) is not None and merge.trial is None
    assert all(each in state.candidates for each in state.beam)
