"""A run's own passes over val_dataset and test_dataset: before, during and after the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_ray.evaluation import Evaluation, evaluate
from lightning_ray.run.rollouts import refuse_total_failure
from lightning_ray.types import RolloutMode

if TYPE_CHECKING:
    from lightning_ray.run.run import Run


class RunEvaluations:
    """See the module. ``last`` is the reward of the last greedy pass over val_dataset."""

    def __init__(self, run: Run):
        self._run = run
        self.last: float | None = None

    async def validate(self) -> Evaluation | None:
        """Greedy pass over val_dataset; its figures, None without one."""
        if "val" not in self._run.datasets:
            return None
        figures = await self._evaluate("val", "greedy")
        self.last = figures.reward
        return figures

    async def all(self, moment: str) -> None:
        """Both data sets, sampled and greedy, into the run's state."""
        run = self._run
        for split in ("val", "test"):
            if split not in run.datasets:
                continue
            with run.reporter.stage(f"{split} {moment}, {len(run.datasets[split])} tasks"):
                for mode in ("sampled", "greedy"):
                    figures = await self._evaluate(split, mode)
                    run.state.evaluations[f"{split}.{mode}_{moment}"] = figures.as_dict()
                    if (split, mode) == ("val", "greedy"):
                        self.last = figures.reward

    async def _evaluate(self, split: RolloutMode, mode: str) -> Evaluation:
        run = self._run
        data = run.datasets[split]
        episodes = await run.play([run.request(data[i], split, mode, {"evaluation": mode}) for i in range(len(data))])
        refuse_total_failure(episodes)
        figures = evaluate(episodes)
        run.trackers.log(
            {
                "kind": split,
                "mode": mode,
                "step": run.state.step,
                "reward": figures.reward,
                "low": figures.low,
                "high": figures.high,
                "turns": figures.turns,
                "failed": figures.failed,
                **{f"annotation.{key}": value for key, value in figures.annotations.items()},
            }
        )
        return figures
