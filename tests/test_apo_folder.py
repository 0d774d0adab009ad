"""What a prompt search keeps in its run's folder, and how it goes on from there. The optimising model is scripted."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.algorithms.apo.report import changes
from lightning_ray.errors import InfrastructureError
from lightning_ray.run.folder import RunFolder
from tests.apo_parts import SEED, SMALL, TRAIN, VAL, in_folder, search, state_of
from tests.scripted_model import ScriptedModel, wishes


def make(model: ScriptedModel, **settings: Any) -> lr.APO[str]:
    return lr.APO[str](model.client(), **{"beam_rounds": 4, **SMALL, **settings})


async def test_a_search_that_was_broken_off_goes_on_from_its_round_as_if_it_had_not(tmp_path: Path) -> None:
    def told(apo: lr.APO[Any]) -> Any:
        known = state_of(apo).model_dump(exclude={"saves", "rollouts", "usage", "history"})
        return known, [(one.made, one.beam, one.best, one.best_score) for one in state_of(apo).history]

    with ScriptedModel(wishes) as model:
        in_folder(whole := make(model), RunFolder(tmp_path / "whole"))
        await search(tmp_path / "whole/store", whole, TRAIN, VAL)
        folder = RunFolder(tmp_path / "broken")
        in_folder(broken := make(model), folder)
        model.script = lambda body: 500 if state_of(broken).round == 2 else wishes(body)
        with pytest.raises(InfrastructureError, match="could not be asked"):
            await search(tmp_path / "broken/store", broken, TRAIN, VAL)
        assert folder.read_state()["round"] == 2

        model.script = wishes
        shown = in_folder(again := make(model), folder, resume=True)
        await search(tmp_path / "broken/store", again, TRAIN, VAL)
    assert told(again) == told(whole)
    assert again.get_best_prompt() == whole.get_best_prompt()
    words = shown.export_text()
    assert "round 3/4" in words and "seed on" not in words and "round 2/4" not in words
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4]


async def test_other_templates_or_tasks_cannot_take_up_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with ScriptedModel(wishes) as model:
        in_folder(apo := make(model, beam_rounds=1), folder)
        await search(tmp_path / "run/store", apo, TRAIN, VAL)
        in_folder(other := make(model), folder, resume=True)
        with pytest.raises(lr.ConfigError, match="the run began with other templates"):
            await search(
                tmp_path / "run/store", other, TRAIN, VAL, resources={"p": lr.PromptTemplate(template="Go {task}")}
            )
        in_folder(other := make(model), folder, resume=True)
        with pytest.raises(lr.ConfigError, match="val_dataset has 1 tasks, and had 6"):
            await search(tmp_path / "run/store", other, TRAIN, VAL[:1])


class Page(HTMLParser):
    """What a page refers to, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.refers += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None: ...

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_folder_tells_the_search(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    nasty: Any = {"prompt_template": lr.PromptTemplate(template="Do {task} <script>alert(1)</script>")}

    def gently(body: dict[str, Any]) -> Any:
        said = wishes(body)
        return said if isinstance(said, int) or not said.startswith("missing") else f"{said} & <b>more</b>"

    with ScriptedModel(gently) as model:
        shown = in_folder(apo := make(model), folder)
        await search(tmp_path / "run/store", apo, TRAIN, VAL, resources=nasty)
    state, raw = state_of(apo), (folder.path / "report.html").read_text()
    page = Page()
    page.feed(raw)
    assert page.refers == [] and page.open == [] and "<script" not in raw and "<b>" not in raw
    for candidate in state.candidates.values():
        assert f"{candidate.version}\n" in page.text.replace(" ", "\n")
        assert candidate.critique is None or candidate.critique in page.text
    assert re.search(r"<ins>\s*(red|blue|green)", raw) and "<polyline" in raw
    assert f"{state.best_score:.3f}" in page.text
    assert f"<td>score_after</td><td>{state.best_score:.4g}</td>" in raw
    assert f"<td>optimizer.calls</td><td>{len(model.bodies)}</td>" in raw

    best = apo.get_best_prompt()
    assert (folder.path / "best/prompt_template.txt").read_text() == best.template
    kept = json.loads((folder.path / "best/prompts.json").read_text())
    assert lr.PromptTemplate(**kept["prompt_template"]) == best
    figures = apo.summary()
    assert (figures["score_before"], figures["score_after"]) == (0.0, state.best_score)
    assert figures["rollouts_scored"] == state.rollouts and figures["optimizer"]["calls"] == len(model.bodies)
    rows = folder.metrics()
    assert [row["reward"] for row in rows] == [one.best_score for one in state.history]
    words = shown.export_text()
    assert "seed on 6 tasks" in words and "score 0.000" in words
    assert re.search(r"round 4/4 .* made, best v\d+ \d\.\d+, \d+ rollouts\n", words)
    assert f"best prompt: {state.best}, score {state.best_score:.3f} (the seed's 0.000)" in words


def test_changes_are_told_word_by_word() -> None:
    assert changes("Say it <now>", "Say it again <now>!") == "Say it <ins>again </ins>&lt;now&gt;<ins>!</ins>"
    assert changes("a b", "a") == "a<del> b</del>"


def test_seed_is_not_needed_to_be_validated_for_a_report(tmp_path: Path) -> None:
    from lightning_ray.algorithms.apo.candidates import Candidate
    from lightning_ray.algorithms.apo.report import write_report
    from lightning_ray.algorithms.apo.state import SearchState

    state = SearchState()
    state.add(Candidate(version="", templates=SEED))
    write_report(tmp_path, state, {"seed": 0})
    assert "(seed not validated)" in (tmp_path / "report.html").read_text()
