"""What Serve is asked for, and how its answers are waited for: every wait with a deadline and a name."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning_ray.config import EngineSettings
from lightning_ray.errors import InfrastructureError
from lightning_ray.placement.places import Places
from lightning_ray.threads import ask_ray, in_thread
from lightning_ray.waiting import waiting

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENGINE = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""One thread an engine; its worker in its own process (half the memory of the default); no compiler at work for 15 s on
the first logprobs, for one small function."""
ASK_AGAIN_SECONDS = 0.5
LEAVE_SECONDS = 2.0
EVERYWHERE = ("0.0.0.0", "::")
"""Hosts of a proxy that listens on every interface of its node."""


def policy_options(settings: EngineSettings, places: Places | None = None) -> dict[str, Any]:
    """What Serve is asked for: replicas, their place, and their limits."""
    variables = QUIET | (CPU_ENGINE if settings.device == "cpu" else {})
    if settings.world_size > 1:
        variables = {name: value for name, value in variables.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    if settings.whole_transfer == "ipc":
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles to memory, from the replica to its own engine
    if settings.device == "cuda" and settings.chosen_dtype == "float32":
        variables["TRITON_F32_DEFAULT"] = "ieee"  # its attention would compute in TF32, which no proof passes
    options = (places or Places()).replica(settings)
    options["ray_actor_options"]["runtime_env"] = {"env_vars": variables}
    options["max_ongoing_requests"] = settings.max_calls
    options["graceful_shutdown_timeout_s"] = settings.drain_seconds
    if settings.max_replicas is None:
        options["num_replicas"] = settings.replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.calls_per_replica,
        }
    return options


async def within(work: Any, seconds: float, what: str) -> Any:
    """Await with a deadline. Raises InfrastructureError that names what did not come."""
    try:
        with waiting(what):
            return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise InfrastructureError(
            f"{what} did not come up within {seconds:.0f} s; see the logs in Ray's session folder, "
            "or allow more by engine.startup_timeout_seconds"
        ) from None


async def deployed(application: Any, name: str, route: str, seconds: float, what: str) -> Any:
    """Have Serve run an application; its handle. Raises InfrastructureError with what Serve says of it, if it does not
    come up within ``seconds``, or fails.
    """
    from ray import serve

    running = in_thread(partial(serve.run, application, name=name, route_prefix=route))
    try:
        return await within(running, seconds, what)
    except InfrastructureError as error:
        raise InfrastructureError(f"{error}{await ask_ray(_said_of, name)}") from None
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InfrastructureError(
            f"{what} failed: {lines[0][:300].rstrip('.')}{await ask_ray(_said_of, name)}"
        ) from error


def _said_of(name: str) -> str:
    """What Serve says of an application that is not up: of each deployment its state, as no place for a replica."""
    from ray import serve

    try:
        deployments = serve.status().applications[name].deployments
    except Exception:  # Serve does not answer either
        return ""
    said = [f"{each}: {status.status.value} {plainly(status.message)}".strip() for each, status in deployments.items()]
    return f". Serve says of it: {'; '.join(said)}" if said else ""


def plainly(message: str) -> str:
    """What Serve says, on a line of at most 800 characters; of a traceback in it, what was raised."""
    lines = message.rstrip().splitlines()
    begun = [place for place, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if begun:
        after = lines[begun[-1] + 1 :]
        raised = next((place for place, line in enumerate(after) if line[:1].strip()), 0)
        lines = after[raised:]
    return " ".join(" ".join(lines).split())[:800]


async def answers_of(handle: Any, method: str, arguments: Sequence[Any], seconds: float, what: str) -> list[Any]:
    """Call a method on every live replica of a deployment. Raises InfrastructureError if one is not in time.

    While there is none to ask, as Serve's controller or the replicas are being started anew, it is asked again; with
    none in time there are no answers.
    """
    from ray.serve.exceptions import DeploymentUnavailableError

    def ask(left: float) -> list[Any]:
        try:
            return list(handle.broadcast(method, *arguments).results(timeout_s=left))
        except DeploymentUnavailableError:
            return []

    deadline = time.monotonic() + seconds
    try:
        with waiting(f"{what} at {method!r}"):
            while (left := deadline - time.monotonic()) > 0:
                if answers := await ask_ray(ask, left):
                    return answers
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            return []
    except TimeoutError:
        raise InfrastructureError(
            f"{what} did not all answer {method!r} within {seconds:.0f} s: look at their load (/status) and logs, or "
            "allow more by engine.swap_timeout_seconds"
        ) from None


def start_serve(host: str, port: int) -> None:
    """Start Serve with its HTTP there, unless it runs already."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})


async def leave_serve() -> None:
    """End Serve's part in this process: a thread that may call Ray even while that is shut down, and what is known of a
    controller that the next run of this process must not ask.
    """
    from ray.serve._private.router import SingletonThreadRouter
    from ray.serve.context import _set_global_client

    loop, SingletonThreadRouter._asyncio_loop = SingletonThreadRouter._asyncio_loop, None
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)
        deadline = time.monotonic() + LEAVE_SECONDS
        while loop.is_running() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
    _set_global_client(None)


def serve_address() -> str:
    """Where Serve's HTTP proxy is reached: ours, or that of the cluster we joined, whose options came first."""
    from ray.serve.context import _get_global_client

    http = _get_global_client().http_config
    host = head_address() if http.host in EVERYWHERE else http.host
    return f"http://{host}:{http.port}"


def head_address() -> str:
    """The address of the head node, which always has one of Serve's proxies; other nodes have one beside replicas."""
    import ray

    [head] = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    address: str = head["NodeManagerAddress"]
    return address
