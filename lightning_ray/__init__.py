"""lightning-ray: train any AI agent with reinforcement learning, on Ray, with almost no change to the agent.

Importing this needs neither ray, torch nor vllm: agents can be written and type-checked anywhere.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_ray.agent import FunctionalLitAgent, LitAgent, llm_rollout, prompt_rollout, rollout
from lightning_ray.algorithms.base import Algorithm, AlgorithmSettings
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.policies import Policy
from lightning_ray.config import EngineSettings
from lightning_ray.emitter import (
    OperationContext,
    emit_annotation,
    emit_exception,
    emit_message,
    emit_object,
    emit_reward,
    find_final_reward,
    find_reward_spans,
    get_message_value,
    get_object_value,
    get_reward_value,
    get_rewards_from_span,
    is_reward_span,
    operation,
    reward,
)
from lightning_ray.errors import (
    AgentError,
    ConfigError,
    InfrastructureError,
    LightningRayError,
    StoreError,
    SwapError,
)
from lightning_ray.hooks import Hook
from lightning_ray.parallel import ParallelWorkerBase
from lightning_ray.placement.settings import Placement, RolePlacement
from lightning_ray.relay.settings import Upstream
from lightning_ray.results import RolloutRawResult
from lightning_ray.semconv import SpanAttributeNames, SpanNames
from lightning_ray.span import (
    Attributes,
    Event,
    Link,
    OtelResource,
    Span,
    SpanContext,
    SpanCoreFields,
    StatusCode,
    TraceState,
    TraceStatus,
)
from lightning_ray.tracing import (
    AgentOpsTracer,
    DummyTracer,
    OtelTracer,
    SpanRecordingContext,
    Tracer,
    clear_active_tracer,
    get_active_tracer,
    set_active_tracer,
)
from lightning_ray.trainer import Trainer
from lightning_ray.trajectories.settings import BatchSettings, GroupPolicy, Keep, OverlongPenalty
from lightning_ray.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Dataset,
    EnqueueRolloutRequest,
    NamedResources,
    PaginatedResult,
    PromptTemplate,
    ProxyLLM,
    Resource,
    ResourcesUpdate,
    ResourceUnion,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    TaskInput,
    Worker,
    WorkerStatus,
)

if TYPE_CHECKING:
    from lightning_ray.adapters import (
        Adapter,
        LlmProxyTraceToTriplet,
        OtelTraceAdapter,
        RewardMatchPolicy,
        TraceAdapter,
        TracerTraceToTriplet,
        TraceToMessages,
        TraceToTripletBase,
        Triplet,
    )
    from lightning_ray.agent_lightning import InMemoryLightningStore, LightningStore, LightningStoreClient, Runner
    from lightning_ray.algorithms.apo import APO
    from lightning_ray.algorithms.batches import batch_iter_over_dataset
    from lightning_ray.algorithms.decorator import FunctionalAlgorithm, algo
    from lightning_ray.algorithms.distill import Distill
    from lightning_ray.algorithms.fast import Baseline, FastAlgorithm
    from lightning_ray.algorithms.injection import with_llm_proxy, with_store
    from lightning_ray.algorithms.own import TrainingAlgorithm
    from lightning_ray.algorithms.session import TrainingSession
    from lightning_ray.algorithms.sft import SFT
    from lightning_ray.command_agent import CommandAgent
    from lightning_ray.dev import DevRollout
    from lightning_ray.evaluation.comparison import Comparison, compare
    from lightning_ray.evaluation.report import EvaluationReport
    from lightning_ray.evaluation.settings import EvaluationSettings
    from lightning_ray.logs import configure_logger, setup_logging, setup_module_logging
    from lightning_ray.stepper import LitAgentRunner
    from lightning_ray.trajectories.episode import Episode

__all__ = [
    "APO",
    "GRPO",
    "LLM",
    "SFT",
    "Adapter",
    "AgentError",
    "AgentOpsTracer",
    "Algorithm",
    "AlgorithmSettings",
    "Attempt",
    "AttemptStatus",
    "AttemptedRollout",
    "Attributes",
    "Baseline",
    "BatchSettings",
    "CommandAgent",
    "Comparison",
    "ConfigError",
    "Dataset",
    "DevRollout",
    "Distill",
    "DummyTracer",
    "EngineSettings",
    "EnqueueRolloutRequest",
    "Episode",
    "EvaluationReport",
    "EvaluationSettings",
    "Event",
    "FastAlgorithm",
    "FunctionalAlgorithm",
    "FunctionalLitAgent",
    "GroupPolicy",
    "Hook",
    "InMemoryLightningStore",
    "InfrastructureError",
    "Keep",
    "LightningRayError",
    "LightningStore",
    "LightningStoreClient",
    "Link",
    "LitAgent",
    "LitAgentRunner",
    "LlmProxyTraceToTriplet",
    "NamedResources",
    "OperationContext",
    "OtelResource",
    "OtelTraceAdapter",
    "OtelTracer",
    "OverlongPenalty",
    "PaginatedResult",
    "ParallelWorkerBase",
    "Placement",
    "Policy",
    "PromptTemplate",
    "ProxyLLM",
    "Resource",
    "ResourceUnion",
    "ResourcesUpdate",
    "RewardMatchPolicy",
    "RolePlacement",
    "Rollout",
    "RolloutConfig",
    "RolloutMode",
    "RolloutRawResult",
    "RolloutStatus",
    "Runner",
    "Span",
    "SpanAttributeNames",
    "SpanContext",
    "SpanCoreFields",
    "SpanNames",
    "SpanRecordingContext",
    "StatusCode",
    "StoreError",
    "SwapError",
    "TaskInput",
    "TraceAdapter",
    "TraceState",
    "TraceStatus",
    "TraceToMessages",
    "TraceToTripletBase",
    "Tracer",
    "TracerTraceToTriplet",
    "Trainer",
    "TrainingAlgorithm",
    "TrainingSession",
    "Triplet",
    "Upstream",
    "Worker",
    "WorkerStatus",
    "algo",
    "batch_iter_over_dataset",
    "clear_active_tracer",
    "compare",
    "configure_logger",
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_reward",
    "find_final_reward",
    "find_reward_spans",
    "get_active_tracer",
    "get_message_value",
    "get_object_value",
    "get_reward_value",
    "get_rewards_from_span",
    "is_reward_span",
    "llm_rollout",
    "operation",
    "prompt_rollout",
    "reward",
    "rollout",
    "set_active_tracer",
    "setup_logging",
    "setup_module_logging",
    "with_llm_proxy",
    "with_store",
]

_LAZY = {
    **dict.fromkeys(
        (
            "Adapter",
            "LlmProxyTraceToTriplet",
            "OtelTraceAdapter",
            "RewardMatchPolicy",
            "TraceAdapter",
            "TraceToMessages",
            "TraceToTripletBase",
            "TracerTraceToTriplet",
            "Triplet",
        ),
        "lightning_ray.adapters",
    ),
    "APO": "lightning_ray.algorithms.apo",
    "Baseline": "lightning_ray.algorithms.fast",
    "CommandAgent": "lightning_ray.command_agent",
    "Comparison": "lightning_ray.evaluation.comparison",
    "DevRollout": "lightning_ray.dev",
    "Distill": "lightning_ray.algorithms.distill",
    "Episode": "lightning_ray.trajectories.episode",
    "EvaluationReport": "lightning_ray.evaluation.report",
    "EvaluationSettings": "lightning_ray.evaluation.settings",
    "FastAlgorithm": "lightning_ray.algorithms.fast",
    "FunctionalAlgorithm": "lightning_ray.algorithms.decorator",
    "LitAgentRunner": "lightning_ray.stepper",
    "TrainingAlgorithm": "lightning_ray.algorithms.own",
    "TrainingSession": "lightning_ray.algorithms.session",
    "SFT": "lightning_ray.algorithms.sft",
    "algo": "lightning_ray.algorithms.decorator",
    "compare": "lightning_ray.evaluation.comparison",
    "batch_iter_over_dataset": "lightning_ray.algorithms.batches",
    **dict.fromkeys(("configure_logger", "setup_logging", "setup_module_logging"), "lightning_ray.logs"),
    **dict.fromkeys(
        ("InMemoryLightningStore", "LightningStore", "LightningStoreClient", "Runner"), "lightning_ray.agent_lightning"
    ),
    "with_llm_proxy": "lightning_ray.algorithms.injection",
    "with_store": "lightning_ray.algorithms.injection",
}
"""Name -> the module that has it, which is imported on first use."""


_PLACED = "Ray places and runs everything: leave it out"
_INSTEAD = {
    "VERL": "train with lr.GRPO(model=..., ...), whose settings are named in README.md",
    "LLMProxy": "a run captures its policy by itself; for other models give Trainer(relays={'name': lr.Upstream(...)})",
    "LightningStoreServer": "serve a store by `serve run deployments.store_api:app`",
    "LightningStoreThreaded": "a StoreClient or HttpStoreClient may be used from any thread as it is",
    "ExecutionStrategy": _PLACED,
    "ClientServerExecutionStrategy": _PLACED,
    "SharedMemoryExecutionStrategy": _PLACED,
    "lightning_cli": "run the script by `lightning-ray train SCRIPT --set NAME=VALUE`",
    "AgentLightningServer": "of Agent Lightning before 0.2; call Trainer.fit",
    "AgentLightningClient": "of Agent Lightning before 0.2; decorate the agent with @lr.rollout",
    "DevTaskLoader": "of Agent Lightning before 0.2; call Trainer.dev",
}
"""Names of Agent Lightning 0.3 that are gone -> what stands in their place."""


def __getattr__(name: str) -> Any:
    if name in _INSTEAD:  # an AttributeError's message would be lost by ``from lightning_ray import``
        raise ImportError(f"lightning_ray has no {name}: {_INSTEAD[name]}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
