"""The settings of APO; names and meaning as in Agent Lightning 0.3, and what there is beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pydantic import Field, PrivateAttr

from lightning_ray.algorithms.apo.checks import check_prompts, check_settings, check_tasks, templates_of
from lightning_ray.algorithms.apo.state import SearchState
from lightning_ray.algorithms.base import AlgorithmSettings, NotAttachedError
from lightning_ray.types import Dataset, PromptTemplate

if TYPE_CHECKING:
    from lightning_ray.run.run import Run

T = TypeVar("T")


class Outcome:
    """Where the search leaves what it found, for whoever holds the algorithm."""

    def __init__(self) -> None:
        self.state = SearchState()


class APO(AlgorithmSettings, Generic[T]):
    """Optimises every PromptTemplate among the initial resources, by rollouts, critiques and edits.

    ``APO(client, ...)``, with an AsyncOpenAI, or ``APO(optimizer="NAME", ...)``, with the name of one of the Trainer's
    relays, whose spend is counted and capped. Several templates take turns: a candidate differs from its parent in one.
    """

    async_openai_client: Any = Field(default=None, exclude=True, repr=False)
    """The model that criticises and edits; the first argument. ``openai_client`` means it too."""
    optimizer: str | None = None
    """The relay's upstream that criticises and edits, if no client does."""
    gradient_model: str = "gpt-5-mini"
    """The model's name for critiques."""
    apply_edit_model: str = "gpt-4.1-mini"
    """The model's name for edits and merges."""
    diversity_temperature: float = Field(default=1.0, ge=0)
    gradient_batch_size: int = Field(default=4, ge=1)
    """Training tasks that a critique sees."""
    val_batch_size: int = Field(default=16, ge=1)
    """Validation tasks on which beam and candidates meet; of no matter for ``selection="pareto"``, which takes all."""
    beam_width: int = Field(default=4, ge=1)
    """Candidates that go on into the next round; also the parents of a round."""
    branch_factor: int = Field(default=4, ge=1)
    """Edits of each parent."""
    beam_rounds: int = Field(default=3, ge=1)
    rollout_batch_timeout: float = Field(default=3600.0, gt=0)
    """Seconds for a candidate's batch of rollouts, after which those that have not ended are cancelled and do not
    count. Batches that are queued at once have the seconds of those before them too."""
    run_initial_validation: bool = True
    """Whether the seed is validated first, and has to be beaten."""
    selection: Literal["beam", "pareto"] = "beam"
    """Beam search, or reflective Pareto search (GEPA)."""
    merges: int = Field(default=1, ge=0)
    """With ``selection="pareto"``, pairs of a round that are merged."""
    target_score: float | None = None
    """The search ends once the best has this mean reward on the validation tasks."""
    candidates_at_once: int | None = Field(default=None, ge=1)
    """Candidates that are played at the same time; all of a round without it."""
    rollout_timeout_seconds: float | None = Field(default=None, gt=0)
    """For one rollout; one that takes longer is a failure of the agent's."""
    infrastructure_retries: int = Field(default=1, ge=0)
    """How often a rollout that the infrastructure failed is queued anew, beyond the store's own retries."""
    show_tasks: bool = True
    """Whether critiques see the tasks, gold answers that are in them included, or only what was said and noted."""
    show_errors: bool = True
    """Whether critiques see the exceptions of agents."""
    max_run_characters: int = Field(default=20_000, ge=100)
    """Of what was said in a rollout, as a critique sees it; the middle is left out."""
    edit_attempts: int = Field(default=3, ge=1)
    """How often an edit is asked for that cannot be used, as it lost a placeholder for instance."""
    optimizer_calls_at_once: int = Field(default=16, ge=1)
    optimizer_timeout_seconds: float = Field(default=600.0, gt=0)
    """For one call of the optimizing model, its retries included."""
    gradient_prompt_files: tuple[Path, ...] = ()
    """What is asked for a critique: Jinja files, one of which is drawn each time; ours without any."""
    apply_edit_prompt_files: tuple[Path, ...] = ()
    merge_prompt_files: tuple[Path, ...] = ()
    seed: int = 0

    _outcome: Outcome = PrivateAttr(default_factory=Outcome)
    _of_run: Run | None = PrivateAttr(default=None)

    def __init__(self, async_openai_client: Any = None, **values: Any) -> None:
        values.pop("_poml_trace", None)  # of 0.3, for debugging: there is no POML here
        outcome = values.pop("_outcome", None)
        client = values.pop("openai_client", None) if async_openai_client is None else async_openai_client
        super().__init__(**({} if client is None else {"async_openai_client": client}), **values)
        if outcome is not None:
            self._outcome = outcome

    def given(self) -> dict[str, Any]:
        """The settings that were given. A copy with overridden ones leaves what it finds with this one too."""
        return {**super().given(), "_outcome": self._outcome}

    def check(self, run: Run) -> None:
        """Templates, tasks, prompt files and the optimizing model must be there."""
        check_settings(self, self.get_trainer().relays)
        check_prompts(self)
        templates_of(self.get_initial_resources())
        check_tasks(run.train_dataset, run.datasets.get("val"))

    async def learn(self, run: Run) -> None:
        """Search, with the run's folder, relay and reports."""
        from lightning_ray.algorithms.over_store import learn_over_store

        self._of_run = run
        try:
            await learn_over_store(self, run)
        finally:
            self._of_run = None

    async def run(self, train_dataset: Dataset[T] | None = None, val_dataset: Dataset[T] | None = None) -> None:
        """Search over ``get_store()``: critiques come from ``train_dataset``, scores from ``val_dataset``."""
        from lightning_ray.algorithms.apo.session import Session

        if self._of_run is None:
            check_settings(self, {})
            check_prompts(self)
        check_tasks(train_dataset, val_dataset)
        assert train_dataset is not None and val_dataset is not None
        await Session(self, self._of_run, train_dataset, val_dataset).search()

    def summary(self) -> dict[str, Any]:
        """Scores and counts."""
        from lightning_ray.algorithms.apo.report import summary_of

        return summary_of(self._outcome.state)

    def get_best_prompt(self, name: str | None = None) -> PromptTemplate:
        """The best template: of that resource, or of the first. Raises NotAttachedError (a ValueError) before a run,
        KeyError for a resource that is no template of the run's.
        """
        prompts = self.get_best_prompts()
        return prompts[next(iter(prompts)) if name is None else name]

    def get_best_prompts(self) -> dict[str, PromptTemplate]:
        """The best templates by the names of their resources. Raises as ``get_best_prompt``."""
        state: SearchState = self._outcome.state
        if not state.candidates:
            raise NotAttachedError("there is no best prompt yet: call get_best_prompt() after Trainer.fit()")
        return dict(state.best_candidate.templates)
