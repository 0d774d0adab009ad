"""The models of a subject on vLLM, as their folders have them, each proved if its folder says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ray.algorithms.base import Algorithm
from lightning_ray.algorithms.weights import WeightAlgorithm
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings
from lightning_ray.errors import ConfigError, SwapError
from lightning_ray.evaluation.adapters import merge_adapter
from lightning_ray.evaluation.plays import POLICY
from lightning_ray.evaluation.subject import Model, Subject
from lightning_ray.machine import check_memory, check_port
from lightning_ray.policy.loaded import Loaded, loaded_from
from lightning_ray.policy.model_folder import ADAPTER_CONFIG
from lightning_ray.progress import Reporter, as_current
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.state import ONLY
from lightning_ray.threads import in_thread
from lightning_ray.types import ProxyLLM


class ServedModels:
    """See the module. The trainer's algorithm, if it has one that trains weights, says how they are served."""

    def __init__(self, algorithm: Algorithm | None, subject: Subject, reporter: Reporter):
        self._algorithm = algorithm
        self._subject = subject
        self._reporter = reporter

    def check(self, local: bool) -> None:
        """Raises ConfigError for a port that is taken and, where Ray is ours and on this machine, too little memory."""
        engines = [self._settings(policy)[1] for policy in self._models()]
        for engine in engines:
            check_port(engine)
        if local and engines:
            check_memory(engines, 0)

    async def serve(self, cluster: Cluster, folder: RunFolder) -> tuple[dict[str, ProxyLLM], dict[str, Any]]:
        """The endpoints by the names under which agents find them, and what vouches for each policy's weights.

        Raises SwapError if a replica's weights are not those that were saved.
        """
        found: dict[str, ProxyLLM] = {}
        proofs: dict[str, Any] = {}
        for policy, model in (await self._folders(folder)).items():
            name, engine = self._settings(policy)
            loaded = loaded_from(model, self._subject.version(policy), engine.chosen_tolerance)
            with self._reporter.stage("engine up" if policy == ONLY else f"engine of {policy} up"):
                endpoint = await cluster.start_policy(model, name, engine, loaded, policy)
                proofs[policy] = await _proof(cluster, policy, model, loaded)
            found["main_llm" if policy == ONLY else policy] = endpoint
        return found, proofs

    def folders(self, folder: RunFolder) -> dict[str, Path]:
        """What replicas read, by what it is to a person: models, and those that the evaluation's folder is to hold."""
        given = {f"the model of {policy}": model for policy, model in self._models().items() if isinstance(model, Path)}
        return {**given, "the evaluation's folder": folder.path} if self._models() else {}

    def engines(self) -> dict[str, EngineSettings]:
        """Of all that are served."""
        return {policy: self._settings(policy)[1] for policy in self._models()}

    def _settings(self, policy: str) -> tuple[str, EngineSettings]:
        """The model's name on the wire, and its engine's settings."""
        algorithm = self._algorithm
        if not isinstance(algorithm, WeightAlgorithm):
            return (POLICY if policy == ONLY else policy), EngineSettings()
        if policy == ONLY:
            return algorithm.model_name, _as_loaded(algorithm.engine)
        declared = {**algorithm.trained(), **algorithm.frozen()}
        if policy not in declared:
            raise ConfigError(
                f"{self._subject.title} has a policy {policy!r}, and the trainer's algorithm declares "
                f"{', '.join(declared)}: evaluate it with the script that trained it"
            )
        return declared[policy].model_name, _as_loaded(declared[policy].engine)

    def _models(self) -> dict[str, Model]:
        """Those of the subject; beside several policies that were trained, those that were not."""
        models = dict(self._subject.models)
        if isinstance(self._algorithm, WeightAlgorithm) and models and not self._subject.alone:
            for name, own in self._algorithm.frozen().items():
                if name not in models and own.model is not None:
                    models[name] = own.model if callable(own.model) else Path(own.model)
        return models

    async def _folders(self, folder: RunFolder) -> dict[str, Path]:
        """Where each model is: made, or merged with its adapter, if need be. What makes one makes it once."""
        found: dict[str, Path] = {}
        made: dict[int, Path] = {}
        for policy, model in self._models().items():
            target = folder.model_of(policy)
            if not isinstance(model, Path):
                if id(model) not in made:
                    made[id(model)] = target
                    with self._reporter.stage("warm start") as stage, as_current(stage):
                        await in_thread(model, target)
                found[policy] = made[id(model)]
            elif (model / ADAPTER_CONFIG).is_file():
                with self._reporter.stage("adapter merged"):
                    await in_thread(merge_adapter, model, target)
                found[policy] = target
            else:
                found[policy] = model
        return found


def _as_loaded(engine: EngineSettings) -> EngineSettings:
    """Without what swaps need."""
    return engine.model_copy(update={"adapter_rank": 0, "transfer": "auto"})


async def _proof(cluster: Cluster, policy: str, model: Path, loaded: Loaded) -> dict[str, Any]:
    proof: dict[str, Any] = {}
    for replica in await cluster.applications.replicas_of(policy)("describe"):
        if not replica["proved"]:
            raise SwapError(loaded.refusal(model, replica["replica_id"], replica["loaded_diff"]))
        proof = loaded.proof(replica["loaded_diff"])
    return proof
