"""What a search leaves for people: ``report.html`` (self-contained), the best templates, and figures."""

from __future__ import annotations

import difflib
import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from lightning_ray.algorithms.apo.candidates import Candidate, number
from lightning_ray.algorithms.apo.state import SearchState
from lightning_ray.types import PromptTemplate

_PAGE = Path(__file__).with_name("report.html")
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
WIDTH, HEIGHT = 640, 160


def summary_of(state: SearchState) -> dict[str, Any]:
    """What summary.json gets. Scores are mean rewards over the validation tasks."""
    return {
        "score_before": state.seed_score,
        "score_after": state.best_score,
        "best_version": state.best,
        "rounds": state.round,
        "candidates": len(state.candidates),
        "rollouts_scored": state.rollouts - state.masked,
        "rollouts_masked": state.masked,
        "optimizer": state.usage.model_dump(),
        "stopped": state.stopped,
    }


def row_of(state: SearchState) -> dict[str, Any]:
    """The figures of the last round, for trackers."""
    made = state.history[-1].made if state.history else []
    return {
        "kind": "val",
        "mode": "prompts",
        "step": state.round,
        "reward": state.best_score,
        "best": state.best,
        "candidates": len(made),
        "rollouts": state.rollouts,
        "optimizer_calls": state.usage.calls,
        "optimizer_tokens": state.usage.prompt_tokens + state.usage.completion_tokens,
    }


def write_best(folder: Path, state: SearchState) -> None:
    """``best/NAME.txt`` for each template of the best candidate, and ``best/prompts.json`` with all of them."""
    best = folder / "best"
    best.mkdir(exist_ok=True)
    templates = state.best_candidate.templates
    for name, template in templates.items():
        write_whole(best / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.txt", template.template)
    as_json = {name: template.model_dump(mode="json") for name, template in templates.items()}
    write_whole(best / "prompts.json", json.dumps(as_json, indent=2, ensure_ascii=False) + "\n")


def write_report(folder: Path, state: SearchState, settings: Mapping[str, Any]) -> None:
    """``report.html``: every candidate with its critique, its scores, and what it changed of its parent."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE.read_text())
    best, seed = state.best_candidate, state.candidates["v0"]
    text = page.render(
        name=folder.name,
        state=state,
        settings={name: value for name, value in settings.items() if value not in (None, (), "")},
        summary=flat(summary_of(state)),
        best=[(name, template, changes_of(seed, best, name)) for name, template in best.templates.items()],
        candidates=[described(state, each) for each in sorted(state.candidates.values(), key=newest_first)],
        curve=curve(state),
        width=WIDTH,
        height=HEIGHT,
    )
    write_whole(folder / "report.html", text)


def flat(figures: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Figures for people: those within others by ``name.inner``, fractions with four digits, nothing that is None."""
    shown: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            shown |= flat(value, f"{of}{name}.")
        elif value is not None:
            shown[f"{of}{name}"] = f"{value:.4g}" if isinstance(value, float) else value
    return shown


def newest_first(candidate: Candidate) -> int:
    """The order of candidates in the report."""
    return -number(candidate.version)


def described(state: SearchState, candidate: Candidate) -> dict[str, Any]:
    """A candidate as the page shows it."""
    parent = state.candidates[candidate.parents[0]] if candidate.parents else candidate
    marks = ["best"] * (candidate.version == state.best) + ["goes on"] * (candidate.version in state.beam)
    rewards = sorted(candidate.rewards.items())
    low, high = bounds(state)
    return {
        "candidate": candidate,
        "marks": marks,
        "mean": candidate.mean(candidate.rewards),
        "rewards": [(task, reward, round(100 * (reward - low) / (high - low))) for task, reward in rewards],
        "changes": [(name, changes_of(parent, candidate, name)) for name in candidate.changed],
    }


def bounds(state: SearchState) -> tuple[float, float]:
    """Least and greatest reward seen, apart."""
    rewards = [reward for each in state.candidates.values() for reward in each.rewards.values()] or [0.0]
    low, high = min(0.0, *rewards), max(rewards)
    return low, high if high > low else low + 1.0


def changes_of(parent: Candidate, candidate: Candidate, name: str) -> Any:
    """What a template has that the parent's has not, and the other way round, as HTML."""
    import markupsafe

    before: PromptTemplate = parent.templates[name]
    return markupsafe.Markup(changes(before.template, candidate.templates[name].template))


def changes(before: str, after: str) -> str:
    """Two texts in one, word by word: what went in <del>, what came in <ins>; escaped."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    parts: list[str] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = html.escape("".join(old[a:b])), html.escape("".join(new[c:d]))
        if kind == "equal":
            parts.append(come)
            continue
        parts.append((f"<del>{gone}</del>" if gone else "") + (f"<ins>{come}</ins>" if come else ""))
    return "".join(parts)


def curve(state: SearchState) -> str:
    """The points of the best score over the rollouts played, for an SVG of WIDTH by HEIGHT; "" without two rounds."""
    points = [(one.rollouts, one.best_score) for one in state.history if one.best_score is not None]
    if state.seed_score is not None:
        points.insert(0, (0, state.seed_score))
    if len(points) < 2:
        return ""
    low, high = bounds(state)
    most = points[-1][0]
    return " ".join(
        f"{WIDTH * rollouts / most:.1f},{HEIGHT * (1 - (score - low) / (high - low)):.1f}" for rollouts, score in points
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    os.replace(draft, path)
