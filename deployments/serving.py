"""A trained model for inference, as a Ray Serve application: vLLM's own server, without capture, store and swaps.

    LIGHTNING_RAY_API_KEY=... serve run deployments.serving:app model=runs/quickstart@best

Clients are OpenAI's and Anthropic's, at ``/v1`` with that key. Invariants: a checkpoint is answered from only if the
replica reproduces the logprobs that its trainer saved with it; without the key nobody is answered, but for ``/health``.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from deployments.handlers import handlers_kept
from deployments.lifetime import CHECK_SECONDS
from deployments.temporary import keep_with_ray
from lightning_ray.capture.refusal import refuse
from lightning_ray.config import EngineSettings
from lightning_ray.deaths.last_words import failure_written
from lightning_ray.errors import ConfigError, SwapError
from lightning_ray.evaluation.subject import Subject, subject_of
from lightning_ray.policy import engine_failure
from lightning_ray.policy.engine_load import EngineLoad
from lightning_ray.policy.loaded import Loaded, loaded_from
from lightning_ray.policy.proof import CANARY, max_difference
from lightning_ray.policy.stalls import StallWatch
from lightning_ray.run.state import ONLY
from lightning_ray.serving import policy_options

KEY_VARIABLE = "LIGHTNING_RAY_API_KEY"
KEY_LENGTH = 16
OPEN = "/health"


class ServingSettings(BaseModel):
    """Arguments of ``app``."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """A run (``runs/sql``, ``runs/sql@best``, ``runs/sql@30``) or a model's folder, under this path on every node."""
    policy: str = ONLY
    """Which of a run's several policies."""
    name: str = "policy"
    """The model's name on the wire."""
    engine: EngineSettings = Field(default_factory=EngineSettings)
    key_file: Path | None = None
    """Where the key is, on every node. The variable LIGHTNING_RAY_API_KEY of the replica goes first."""


def app(args: ServingSettings) -> serve.Application:
    """Build the application. Raises ConfigError if there is no such model."""
    _chosen(args)
    deployment: Any = ServedModel
    return deployment.options(**policy_options(args.engine)).bind(args)


@serve.deployment(name="model", max_queued_requests=-1, health_check_period_s=CHECK_SECONDS)
@serve.ingress()
class ServedModel:
    """One replica."""

    def __init__(self, args: ServingSettings):
        self.args = args
        self.key = find_key(args.key_file)
        self.engine: Any = None
        self.load = EngineLoad()
        self.stalls = StallWatch(self.load, args.engine.stall_seconds)

    async def __serve_build_asgi_app__(self) -> KeyGuard:
        """Start the engine, have it prove its weights, and put the key before vLLM's own app."""
        keep_with_ray()
        with handlers_kept():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.entrypoints.launchers.api_server.app_state import init_app_state
            from vllm.entrypoints.launchers.app import build_app
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
            from vllm.usage.usage_lib import UsageContext
            from vllm.utils.argparse_utils import FlexibleArgumentParser
            from vllm.v1.engine.async_llm import AsyncLLM

        from lightning_ray.policy.engine_arguments import engine_arguments

        engine = self.args.engine
        folder, loaded = await asyncio.to_thread(_fetched, self.args)
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(engine_arguments(str(folder), self.args.name, engine))
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        place = _on_a_thread() if engine.chosen_process == "replica" else nullcontext()
        with engine_failure.told(engine), place:
            self.engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True, stat_loggers=[self.load.logger()])
        await prove(self.engine, folder, loaded)
        tasks = await self.engine.get_supported_tasks()
        app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, args, tasks)
        return KeyGuard(app, self.key)

    async def check_health(self) -> None:
        """Raise when the engine is dead or hangs: Serve then restarts the replica."""
        if self.engine is None:
            return
        with failure_written():
            await self.engine.check_health()
            self.stalls.check(self.engine.output_processor.has_unfinished_requests(), swapping=False, held_up=0.0)

    def __del__(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()


async def prove(engine: Any, folder: Path, loaded: Loaded) -> None:
    """Raises SwapError if the engine computes otherwise than the trainer that saved the folder."""
    if not loaded.canaries:
        return
    found = await asyncio.gather(*(_logprobs(engine, place, list(ids)) for place, ids in enumerate(loaded.canaries)))
    difference = max_difference(loaded.expected, found)
    if difference > loaded.tolerance:
        raise SwapError(loaded.refusal(folder, f"of process {os.getpid()}", difference))


async def _logprobs(engine: Any, place: int, ids: list[int]) -> list[float]:
    """Of tokens 1.. of a canary."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    asked = SamplingParams(prompt_logprobs=0, max_tokens=1)
    async for output in engine.generate(TokensPrompt(prompt_token_ids=ids), asked, f"{CANARY}{place}"):
        answer = output
    return [each[token].logprob for token, each in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]


class KeyGuard:
    """An ASGI app that answers 401 to who has not the key, as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``."""

    def __init__(self, app: Any, key: str):
        self.app = app
        self._known = key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request. Of other kinds than HTTP's only the app's own start and end are passed on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "use HTTP"})
        elif scope["type"] == "http" and not self._admits(scope):
            await refuse(
                send, None, 401, f"the key is missing or wrong: send what {KEY_VARIABLE} is where this is served"
            )
        else:
            await self.app(scope, receive, send)

    def _admits(self, scope: Any) -> bool:
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ") or headers.get(b"x-api-key", b"")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path == OPEN or secrets.compare_digest(given, self._known)


def find_key(key_file: Path | None) -> str:
    """The key of the environment, or of the file. Raises ConfigError."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and key_file is not None:
        try:
            key = key_file.expanduser().read_text().strip()
        except OSError as error:
            raise ConfigError(f"key_file={str(key_file)!r} cannot be read: {error.strerror}") from error
    if len(key) < KEY_LENGTH:
        raise ConfigError(f"set {KEY_VARIABLE} or key_file=PATH to {KEY_LENGTH} characters or more: clients send it")
    return key


def _chosen(args: ServingSettings) -> tuple[Subject, Path]:
    """What is to be served. Raises ConfigError."""
    from lightning_ray.trainer import Trainer

    subject = subject_of(args.model, Trainer())
    folder = subject.models.get(args.policy)
    if not isinstance(folder, Path):
        known = ", ".join(repr(name) for name in subject.models)
        raise ConfigError(f"policy={args.policy!r}: {subject.title} has {known}; name one of them by policy=NAME")
    return subject, folder


def _fetched(args: ServingSettings) -> tuple[Path, Loaded]:
    """The folder that the engine loads, with an adapter merged into its base, and what vouches for it."""
    from lightning_ray.evaluation.adapters import merge_adapter
    from lightning_ray.policy.model_folder import ADAPTER_CONFIG

    subject, folder = _chosen(args)
    if (folder / ADAPTER_CONFIG).is_file():
        merged = Path(tempfile.mkdtemp(prefix="merged-"))
        merge_adapter(folder, merged)
        folder = merged
    return folder, loaded_from(folder, subject.version(args.policy), args.engine.chosen_tolerance)


def _on_a_thread() -> Any:
    from lightning_ray.policy.engine_thread import engine_on_a_thread

    return engine_on_a_thread()
