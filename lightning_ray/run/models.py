"""The models of a run before its first step: made where the user gave a function, and where agents find them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_ray.algorithms.grpo import NEUTRAL
from lightning_ray.algorithms.weights import WeightAlgorithm
from lightning_ray.config import RunnerSettings
from lightning_ray.placement.asks import Wanted
from lightning_ray.progress import Reporter, as_current
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.state import ONLY
from lightning_ray.store.base import Store
from lightning_ray.threads import in_thread
from lightning_ray.types import ProxyLLM

RESOURCES = {"sampled": {"temperature": 1.0, **NEUTRAL}, "greedy": {"temperature": 0.0, **NEUTRAL}}
"""Resources by id: the policies, sampled from as they are, and their most likely tokens."""
MAIN = "main_llm"
"""The only policy's name among the resources."""


def wanted_by(settings: WeightAlgorithm, runners: RunnerSettings) -> Wanted:
    """What the run has at work on the cluster."""
    trained = settings.trained()
    engines = {name: own.engine for name, own in {**trained, **settings.frozen()}.items()}
    ranks = {name: own.ranks for name, own in trained.items()}
    return Wanted(engines, ranks, runners.minimum, runners.maximum)


def given_models(settings: WeightAlgorithm) -> dict[str, Path]:
    """Folders of models that the user gave, by what they are to a person."""
    policies = {**settings.trained(), **settings.frozen()}
    return {
        f"the model of {name}" if len(policies) > 1 else "the model": Path(str(own.model)).absolute()
        for name, own in policies.items()
        if own.model is not None and not callable(own.model)
    }


async def initial_models(
    policies: Mapping[str, WeightAlgorithm], folder: RunFolder, resume: bool, reporter: Reporter
) -> dict[str, Path]:
    """By policy; after a resume too, as old checkpoints go and a restarting replica loads them again. A function makes
    one model, for all policies that name it.
    """
    found: dict[str, Path] = {}
    made: dict[int, Path] = {}
    for name, own in policies.items():
        model, place = own.model, folder.model_of(name)
        found[name] = place if callable(model) else Path(str(model))
        if resume or not callable(model):
            continue
        if (same := made.setdefault(id(model), place)) != place:
            place.symlink_to(same.name)
            continue
        place.parent.mkdir(exist_ok=True)
        with reporter.stage("warm start") as stage, as_current(stage):
            await in_thread(model, place)
    return found


async def publish_resources(store: Store, endpoints: Mapping[str, ProxyLLM], relayed: Mapping[str, ProxyLLM]) -> None:
    """What agents get: the policies by name, the only one as ``main_llm``, and what is relayed."""
    for resources_id, sampling in RESOURCES.items():
        own = {
            MAIN if name == ONLY else name: endpoint.model_copy(update={"sampling_parameters": sampling})
            for name, endpoint in endpoints.items()
        }
        await store.update_resources(resources_id, {**own, **relayed})
