"""lightning-ray: train any AI agent with reinforcement learning, on Ray, with almost no change to the agent.

Importing this needs neither ray, torch nor vllm: agents can be written and type-checked anywhere.
"""

from lightning_ray.agent import FunctionalLitAgent, LitAgent, llm_rollout, prompt_rollout, rollout
from lightning_ray.algorithms.base import Algorithm
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.config import EngineSettings
from lightning_ray.emit import emit_annotation, emit_exception, emit_reward
from lightning_ray.errors import (
    AgentError,
    ConfigError,
    InfrastructureError,
    LightningRayError,
    StoreError,
    SwapError,
)
from lightning_ray.trainer import Trainer
from lightning_ray.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    Dataset,
    NamedResources,
    PromptTemplate,
    ProxyLLM,
    Resource,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    Span,
)

__all__ = [
    "GRPO",
    "LLM",
    "AgentError",
    "Algorithm",
    "Attempt",
    "AttemptedRollout",
    "ConfigError",
    "Dataset",
    "EngineSettings",
    "FunctionalLitAgent",
    "InfrastructureError",
    "LightningRayError",
    "LitAgent",
    "NamedResources",
    "PromptTemplate",
    "ProxyLLM",
    "Resource",
    "ResourcesUpdate",
    "Rollout",
    "RolloutConfig",
    "Span",
    "StoreError",
    "SwapError",
    "Trainer",
    "emit_annotation",
    "emit_exception",
    "emit_reward",
    "llm_rollout",
    "prompt_rollout",
    "rollout",
]
