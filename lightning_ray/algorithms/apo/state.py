"""What a search knows: its candidates, the best of them, and how far it is. A checkpoint is this as JSON."""

from __future__ import annotations

from pydantic import BaseModel, Field

from lightning_ray.algorithms.apo.candidates import Candidate
from lightning_ray.types import PromptTemplate


class Usage(BaseModel):
    """What the optimising model was asked for."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float | None = None
    """What the relay counted, in the currency of its upstream's prices; None without a relay."""
    max_spend: float | None = None


class Round(BaseModel):
    """One finished round."""

    round: int
    made: list[str]
    """Versions of its candidates: new ones, and those that were found again."""
    beam: list[str]
    best: str
    best_score: float | None
    rollouts: int
    """Played until its end, since the start of the search."""
    seconds: float


class SearchState(BaseModel):
    """See the module."""

    round: int = 0
    """Rounds that are finished."""
    candidates: dict[str, Candidate] = Field(default_factory=dict)
    beam: list[str] = Field(default_factory=list)
    """The candidates that the next round's parents are taken from; of a Pareto search, its front."""
    best: str = "v0"
    best_score: float | None = None
    """Mean reward over the validation tasks; None before it was validated."""
    seed_score: float | None = None
    val_tasks: int = 0
    """Length of the validation set, whose tasks rewards are kept for by index."""
    merged: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs that were merged, or could not be."""
    train_batches: int = 0
    val_batches: int = 0
    """Batches drawn so far."""
    rollouts: int = 0
    masked: int = 0
    """Of the rollouts, those that count for nothing: the infrastructure failed, or their time was up."""
    history: list[Round] = Field(default_factory=list)
    usage: Usage = Field(default_factory=Usage)
    saves: int = 0
    """How often it was kept: the number of its checkpoint."""
    stopped: str | None = None
    """Why it ended before its last round."""

    def add(self, candidate: Candidate) -> Candidate:
        """Take up a candidate under the next version."""
        candidate.version = f"v{len(self.candidates)}"
        self.candidates[candidate.version] = candidate
        return candidate

    def find(self, templates: dict[str, PromptTemplate]) -> Candidate | None:
        """The candidate that has these very templates."""
        return next((each for each in self.candidates.values() if each.same_templates(templates)), None)

    @property
    def best_candidate(self) -> Candidate:
        """The best so far."""
        return self.candidates[self.best]
