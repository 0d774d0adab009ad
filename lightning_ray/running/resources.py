"""The resources of rollouts, each captured endpoint with its attempt's own key."""

from __future__ import annotations

import time

from lightning_ray.capture.audience import audience_of
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.errors import AgentError
from lightning_ray.store.base import Store
from lightning_ray.types import AttemptedRollout, NamedResources, ProxyLLM

KEY_SECONDS = 6 * 3600.0
"""Life of an attempt's key when its rollout has no timeout."""


class ResourceBook:
    """Fetches resources once; ``secret`` is what keys are signed with."""

    def __init__(self, store: Store, secret: bytes):
        self._store = store
        self._secret = secret
        self._known: dict[str, NamedResources] = {}

    async def of(self, rollout: AttemptedRollout) -> NamedResources:
        """What the rollout's agent gets. Raises AgentError if it names resources that do not exist."""
        resources_id = rollout.resources_id
        if resources_id is None:
            return {}
        known = self._known.get(resources_id)
        if known is None:
            known = self._known[resources_id] = await self._fetch(rollout.rollout_id, resources_id)
        expires = time.time() + (rollout.config.timeout_seconds or KEY_SECONDS)
        return {
            name: self._own(value, rollout, expires) if isinstance(value, ProxyLLM) else value
            for name, value in known.items()
        }

    async def _fetch(self, rollout_id: str, resources_id: str) -> NamedResources:
        update = await self._store.get_resources_by_id(resources_id)
        if update is None:
            raise AgentError(f"rollout {rollout_id} wants resources {resources_id!r}, which do not exist")
        return update.resources

    def _own(self, llm: ProxyLLM, rollout: AttemptedRollout, expires: float) -> ProxyLLM:
        seed = (rollout.metadata or {}).get("seed")
        sampling = llm.sampling_parameters if seed is None else {**llm.sampling_parameters, "seed": seed}
        claims = Claims(rollout.rollout_id, rollout.attempt.attempt_id, expires, sampling, audience_of(llm.endpoint))
        return llm.model_copy(update={"api_key": issue_key(self._secret, claims)})
