"""Every metric, by name. Tags take few values: the run, its policies and replicas, and fixed words.

Ray exports each of them as ``ray_lightning_ray_NAME`` (counters with ``_total`` behind it), with tags of its own beside
ours: ``WorkerId``, ``JobId``, ``NodeAddress``, ``SessionName`` and so on. A gauge is gone some 20 s after its process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "lightning_ray_"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Bounds of the buckets of durations."""
RUN = ("run",)
POLICY = ("run", "policy")
REPLICA = ("run", "policy", "replica")
UPSTREAM = ("run", "upstream")


@dataclass(frozen=True)
class Metric:
    """One metric; ``buckets`` are a histogram's."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    tags: tuple[str, ...]
    description: str
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> frozenset[str]:
        """Names of its series in Prometheus."""
        endings = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}[self.kind]
        return frozenset(f"ray_{PREFIX}{self.name}{ending}" for ending in endings)


def _gauge(name: str, tags: tuple[str, ...], description: str) -> Metric:
    return Metric(name, "gauge", tags, description)


def _counter(name: str, tags: tuple[str, ...], description: str) -> Metric:
    return Metric(name, "counter", tags, description)


_ALL = (
    # Of the run, looked at every few seconds.
    _gauge("queue_length", RUN, "Rollouts that wait for a runner."),
    _gauge("running_rollouts", RUN, "Rollouts that are being played."),
    _gauge("runners", RUN, "Runners that are up."),
    _gauge("store_rollouts", (*RUN, "status"), "Rollouts in the span store, by status."),
    _counter("spans", RUN, "Spans that were stored."),
    _gauge("store_bytes", RUN, "Size of the span store's folder."),
    _gauge("disk_free_bytes", RUN, "Free space where the run's folder is."),
    _gauge("last_progress_timestamp_seconds", RUN, "When a rollout or a step last came to its end; Unix seconds."),
    _gauge("restarts", (*RUN, "part"), "Processes that took another's place so far: runner, replica, trainer, store."),
    _gauge("replicas", POLICY, "Replicas that answered when they were last asked."),
    _gauge("staleness_bound", POLICY, "Weight versions that a trained token may be old: max_staleness."),
    # Of a step.
    _gauge("step", RUN, "Training steps made."),
    _gauge("step_seconds", RUN, "Of the last step, with what lay between it and the step before."),
    _counter("phase_seconds", (*RUN, "phase"), "Seconds of the training loop by phase."),
    _gauge("reward", RUN, "Mean reward of the last step's rollouts."),
    _gauge("validation_reward", RUN, "Mean reward of the last greedy validation."),
    _gauge("turns", RUN, "Mean model calls of a rollout in the last step."),
    _counter("rollouts", RUN, "Rollouts that were played for training."),
    _counter("rollouts_trained", POLICY, "Rollouts that were trained on."),
    _counter("rollouts_dropped", (*POLICY, "reason"), "Rollouts that were not, by reason."),
    _gauge("policy_reward", POLICY, "Mean reward of a policy's rollouts in the last step."),
    _gauge("response_tokens", POLICY, "Mean length of the trajectories' responses in the last step."),
    _gauge("staleness", POLICY, "Mean age of the tokens trained last, in weight versions."),
    _gauge("staleness_max", POLICY, "Age of the oldest of them."),
    _counter("sampled_tokens", POLICY, "Tokens that were sampled for training."),
    _counter("trained_tokens", POLICY, "Tokens that were trained."),
    _gauge("sampled_tokens_per_second", POLICY, "Of the last step, while it was played."),
    _gauge("trained_tokens_per_second", POLICY, "Of the last update."),
    _gauge("update", (*POLICY, "figure"), "Figures of the last update: loss, entropy, grad_norm and so on."),
    _gauge("weight_version", POLICY, "Version of the weights under training."),
    _gauge("swap_seconds", POLICY, "Of the last weight swap, from start to proof."),
    _gauge("swap_part_seconds", (*POLICY, "part"), "Its parts, of the replica that loaded longest."),
    # Of a replica.
    _gauge("replica_running", REPLICA, "Requests that the engine is sampling."),
    _gauge("replica_waiting", REPLICA, "Requests that wait in the engine."),
    _gauge("replica_cache_use", REPLICA, "Share of the key-value cache in use."),
    _gauge("replica_version", REPLICA, "Version of the weights that it has."),
    _gauge("replica_proved", REPLICA, "1 if it proved these weights, 0 if it answers nobody."),
    _counter("calls", (*REPLICA, "finish"), "Model calls that ended, by finish reason."),
    _counter("prompt_tokens", REPLICA, "Tokens of their prompts."),
    _counter("cached_tokens", REPLICA, "Of these, tokens whose keys and values were there already."),
    _counter("answered_tokens", REPLICA, "Tokens that were sampled for them."),
    Metric(
        "call_seconds",
        "histogram",
        (*REPLICA, "part"),
        "Of model calls: queue (in the engine), first_token and total (from the request).",
        SECONDS,
    ),
    # Of the relay; so far, also before it was started anew.
    _gauge("relay_running", UPSTREAM, "Calls that an upstream is answering."),
    _gauge("relay_waiting", UPSTREAM, "Calls that its limits hold up."),
    _gauge("relay_calls", UPSTREAM, "Calls that ended so far."),
    _gauge("relay_errors", UPSTREAM, "Of these, that failed."),
    _gauge("relay_tokens", (*UPSTREAM, "kind"), "Tokens so far: of prompts, of these cached, and answered."),
    _gauge("relay_money", UPSTREAM, "What they cost, in the currency of the prices."),
)
METRICS = {metric.name: metric for metric in _ALL}
