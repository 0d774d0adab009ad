"""The variables that a program finds: a clean base, where its model is, its task, and where rewards go.

A runner's own environment has the trainer's keys and the settings of its libraries; a program gets ``BASE`` of it, and
what its agent asks for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_ray.traces.ids import root_id_of, to_header, trace_id_of
from lightning_ray.types import LLM

BASE = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
)
"""Passed on from the runner, if set."""
ENGINE_BASE = ("DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT", "CONTAINER_HOST", "XDG_RUNTIME_DIR")
"""Passed on to a container engine's client, and not into the container."""
MAX_TASK_BYTES = 64 * 1024
"""A larger task is in its file only: the system limits an environment."""
REPORT_TOKEN = "LIGHTNING_REPORT_TOKEN"
NO_KEY = "no-key"
"""The API key where the endpoint wants none: clients refuse to start without one."""


def base_environment(inherit: bool | Sequence[str]) -> dict[str, str]:
    """What is passed on from this process: ``BASE``, with more names, or everything."""
    if inherit is True:
        return dict(os.environ)
    names = BASE if inherit is False else (*BASE, *inherit)
    return {name: os.environ[name] for name in names if name in os.environ}


def model_environment(llm: LLM) -> dict[str, str]:
    """Where OpenAI's and Anthropic's clients look for their endpoint; the latter's adds ``/v1`` itself."""
    key = llm.api_key or NO_KEY
    return {
        "OPENAI_BASE_URL": llm.endpoint,
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": llm.model,
        "ANTHROPIC_BASE_URL": llm.endpoint.rstrip("/").removesuffix("/v1"),
        "ANTHROPIC_API_KEY": key,
        "ANTHROPIC_MODEL": llm.model,
        "LIGHTNING_MODEL": llm.model,
    }


def attempt_environment(
    rollout_id: str, attempt_id: str, task: str, task_file: Path, reward_file: Path, report_url: str, token: str
) -> dict[str, str]:
    """What is this attempt's own. OpenTelemetry exporters send its ids along, if the agent's env= gives an endpoint;
    spans that begin by ``TRACEPARENT`` are of the attempt's trace.
    """
    given = {
        "LIGHTNING_ROLLOUT_ID": rollout_id,
        "LIGHTNING_ATTEMPT_ID": attempt_id,
        "LIGHTNING_TASK_FILE": str(task_file),
        "LIGHTNING_REWARD_FILE": str(reward_file),
        "LIGHTNING_REPORT_URL": report_url,
        REPORT_TOKEN: token,
        "TRACEPARENT": to_header(trace_id_of(rollout_id, attempt_id), root_id_of(rollout_id, attempt_id)),
        "OTEL_EXPORTER_OTLP_HEADERS": f"x-lightning-rollout-id={rollout_id},x-lightning-attempt-id={attempt_id}",
        "OTEL_RESOURCE_ATTRIBUTES": f"agentlightning.rollout_id={rollout_id},agentlightning.attempt_id={attempt_id}",
    }
    if len(task.encode()) < MAX_TASK_BYTES and "\0" not in task:
        given["LIGHTNING_TASK"] = task
    return given


def engine_environment(given: Mapping[str, str]) -> dict[str, str]:
    """What a container engine's client runs with: its own needs, and what it is to pass on."""
    own = {name: os.environ[name] for name in (*BASE, *ENGINE_BASE) if name in os.environ}
    return {**own, **given}
