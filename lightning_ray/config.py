"""Settings: pydantic models that refuse unknown keys, and errors that name key, value and fix."""

from __future__ import annotations

import difflib
import os
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lightning_ray.errors import ConfigError

CPU_KV_CACHE_MB, SHARED_KV_CACHE_MB = 128, 2048
LOGPROB_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Nats by which kernels of engine and trainer may differ at a token."""


class Settings(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class EngineSettings(Settings):
    """How the policy is served by vLLM on Ray Serve."""

    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    """With it, there are between ``replicas`` and so many, as calls need them."""
    calls_per_replica: int = Field(default=32, ge=1)
    """Calls at once that one replica is meant for, where their number follows the calls."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    """GPUs of a replica: the product of both, side by side in a placement group."""
    host: str = "127.0.0.1"
    """Where the deployment listens; ``0.0.0.0`` lets agents on other nodes reach it, at the head's address."""
    port: int = Field(default=0, ge=0, le=65535)
    """HTTP port of the deployment; 0 takes a free one."""
    max_calls: int = Field(default=2048, ge=1)
    """Calls at once that a replica takes; further ones wait in its queue."""
    max_calls_per_attempt: int = Field(default=256, ge=1)
    """Calls at once of one attempt; a further one is answered 429."""
    max_body_mb: int = Field(default=32, ge=1)
    """Size of a request; a larger one is answered 413."""
    drain_seconds: float = Field(default=5.0, ge=0)
    """For a replica's calls to end when it is taken away."""
    continuation: bool = True
    """Where a prompt continues what was said in its attempt, it gets the ids that were sampled, whatever ids the
    tokenizer makes of their text."""
    device: Literal["cpu", "cuda"] = "cpu"
    process: Literal["auto", "replica", "own"] = "auto"
    """Where the engine runs: in the replica's process (less memory, a faster start, one core for both) or in its own;
    ``auto`` is the replica's on CPU with one worker, and its own otherwise."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of engine and trainer; ``auto`` is float32 on CPU and bfloat16 on CUDA."""
    max_model_len: int | None = None
    max_num_seqs: int = Field(default=64, ge=1)
    kv_cache_memory_mb: int | None = Field(default=None, ge=8)
    """Of a replica; by default 128 on CPU, 2048 on a GPU that it shares with the trainer, and what vLLM finds on one of
    its own (``arguments`` takes its ``gpu-memory-utilization``)."""
    tool_parser: str | None = None
    """vLLM's parser of tool calls (``hermes``, ``qwen3_coder``, ...); without one, tools cannot be called."""
    reasoning_parser: str | None = None
    """vLLM's parser of reasoning (``qwen3``, ``deepseek_r1``, ...)."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``vllm serve`` by their names without dashes; true for a flag."""
    share_gpu: bool = False
    """Whether the trainer rank and the engine live on one GPU, each by half of it as Ray counts; for one rank, one
    replica and one policy."""
    sleep: bool = False
    """On a shared GPU: whether the engine gives up its memory (vLLM's sleep) while the trainer updates; it answers
    again when the swap is proved."""
    transfer: Literal["auto", "adapter", "object", "gloo", "nccl", "ipc"] = "auto"
    """What carries the weights from trainer to engine. ``adapter`` sends a LoRA adapter alone, by the object store, and
    the engine computes with it beside its own weights; the others send whole weights, an adapter merged in. ``auto`` is
    ``adapter`` with LoRA where vLLM can, else the object store on CPU, NCCL on CUDA, and on a shared GPU CUDA IPC."""
    adapter_rank: int = Field(default=0, ge=0)
    """Rank of the LoRA adapter that is trained; the algorithm sets it."""
    swap_mode: Literal["keep", "wait"] = "keep"
    """Whether requests in flight go on over a swap, or are waited for before it."""
    logprob_tolerance: float | None = Field(default=None, gt=0)
    """Largest difference of a canary logprob (nats) between engine and trainer at which a swap counts as proved; by
    default 1e-4, and 0.5 in bfloat16, where whole weights of one worker are compared by their bits besides."""
    startup_timeout_seconds: float = Field(default=300.0, gt=0)
    swap_timeout_seconds: float = Field(default=120.0, gt=0)
    stall_seconds: float = Field(default=300.0, gt=0)
    """For a replica with calls to make some progress, be it a single step of its engine; else it is started anew."""

    @property
    def world_size(self) -> int:
        """Workers of a replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def chosen_process(self) -> Literal["replica", "own"]:
        """``process``, with ``auto`` decided."""
        if self.process == "auto":
            return "replica" if self.device == "cpu" and self.world_size == 1 else "own"
        return self.process

    @property
    def chosen_kv_cache_mb(self) -> int | None:
        """``kv_cache_memory_mb``, with its default; None leaves it to vLLM."""
        if self.kv_cache_memory_mb is not None:
            return self.kv_cache_memory_mb
        if self.share_gpu:  # vLLM would take what the trainer allocates meanwhile for its own
            return SHARED_KV_CACHE_MB
        return CPU_KV_CACHE_MB if self.device == "cpu" else None

    @property
    def chosen_dtype(self) -> Literal["float32", "bfloat16"]:
        """``dtype``, with ``auto`` decided."""
        if self.dtype == "auto":
            return "float32" if self.device == "cpu" else "bfloat16"
        return self.dtype

    @property
    def chosen_tolerance(self) -> float:
        """``logprob_tolerance``, with its default."""
        return LOGPROB_TOLERANCE[self.chosen_dtype] if self.logprob_tolerance is None else self.logprob_tolerance

    @model_validator(mode="after")
    def _one_gpu_for_both(self) -> EngineSettings:
        if self.share_gpu and self.device != "cuda":
            raise ValueError("share_gpu is for GPUs: set device='cuda' too, or leave it out")
        if self.share_gpu and (self.world_size > 1 or self.max_replicas not in (None, self.replicas)):
            raise ValueError(
                "share_gpu puts each replica beside a trainer rank: it goes with tensor_parallel=1, "
                "pipeline_parallel=1 and a fixed number of replicas"
            )
        if self.sleep and not self.share_gpu:
            raise ValueError("sleep leaves a shared GPU to the trainer: set share_gpu=true too, or leave it out")
        if self.transfer == "ipc" and not self.share_gpu:
            raise ValueError("transfer='ipc' hands over GPU memory in place: set share_gpu=true, or transfer='nccl'")
        if self.transfer == "nccl" and self.share_gpu:
            raise ValueError("NCCL has no group with two ranks on one GPU: leave transfer at 'auto', or share_gpu out")
        return self

    @property
    def chosen_transfer(self) -> Literal["adapter", "object", "gloo", "nccl", "ipc"]:
        """``transfer``, with ``auto`` decided; the engine may find that it cannot serve an adapter."""
        if self.transfer != "auto":
            return self.transfer
        return "adapter" if self.adapter_rank else self.whole_transfer

    @property
    def whole_transfer(self) -> Literal["object", "gloo", "nccl", "ipc"]:
        """What carries whole weights, if they are sent."""
        if self.transfer == "auto" or self.transfer == "adapter":
            return "object" if self.device == "cpu" else "ipc" if self.share_gpu else "nccl"
        return self.transfer

    @property
    def gpu_share(self) -> float:
        """GPUs of a worker, and of a trainer rank, as Ray counts them."""
        return 0.0 if self.device == "cpu" else 0.5 if self.share_gpu else 1.0


class RunnerSettings(Settings):
    """The runners of a run: how many, and how each plays."""

    minimum: int = Field(default=1, ge=1)
    maximum: int = Field(default=1, ge=1)
    """There are more than ``minimum`` while more is queued than they can play."""
    concurrency: int = Field(default=64, ge=1)
    """Rollouts that one runner plays at once."""
    isolation: Literal["process"] | None = None
    """``process`` plays each attempt in a process of its own, which may crash."""
    python: str | None = None
    """The interpreter of another environment, which plays the agent; ``isolation`` is ``process`` then."""

    @model_validator(mode="before")
    @classmethod
    def _isolate(cls, given: Any) -> Any:
        return {**given, "isolation": "process"} if isinstance(given, dict) and given.get("python") else given

    @field_validator("python")
    @classmethod
    def _absolute(cls, python: str | None) -> str | None:
        """Runners may be in another folder; a venv's interpreter is a link that is not followed."""
        return os.path.abspath(os.path.expanduser(python)) if python and os.sep in python else python


S = TypeVar("S", bound=BaseModel)


def build(cls: type[S], values: dict[str, Any], where: str) -> S:
    """Make settings from plain values. Raises ConfigError that names each bad key, its value and the fix."""
    try:
        return cls(**values)
    except ValidationError as error:
        raise ConfigError(explain(error, cls, where)) from None


def explain(error: ValidationError, cls: type[BaseModel], where: str) -> str:
    """One line for each setting that pydantic found at fault; what it misses in each kind of a union in one."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        path = _path(problem, cls)
        complaint = _complaint(problem, cls, path)
        lines.setdefault(_subject(problem, ".".join([where, *path] if where else path)), []).append(complaint)
    return "\n".join(subject + " or ".join(complaints) for subject, complaints in lines.items())


def _path(problem: Any, cls: type[BaseModel]) -> list[str]:
    """The keys that lead to the problem, without pydantic's names for the kinds of a union."""
    path: list[str] = []
    for part in problem["loc"]:
        if not isinstance(part, int) and part not in _fields_at(cls, path) and problem["type"] != "extra_forbidden":
            break
        path.append(str(part))
    return path


def _subject(problem: Any, key: str) -> str:
    return f"{key} " if problem["type"] == "missing" else f"{key}={problem['input']!r}: "


def _complaint(problem: Any, cls: type[BaseModel], path: list[str]) -> str:
    if problem["type"] == "extra_forbidden":
        known = list(_fields_at(cls, path[:-1]))
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"there is no such setting; {hint}"
    if problem["type"] == "missing":
        return "is required"
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields_at(cls: type[BaseModel], path: list[str]) -> dict[str, Any]:
    for part in path:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return {}
        cls = annotation
    return dict(cls.model_fields)
