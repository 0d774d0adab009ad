"""Runs as jobs of a Ray cluster: submitted, listed, stopped and resumed by their ids. Thin over Ray's job client.

A job says by its entrypoint what it runs (``lightning-ray train ...``), and by its log how far it is.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.mirror import is_url
from lightning_ray.stopping import WAIT

STOP_SECONDS = 120
"""That a job has for its checkpoint and its end, before Ray kills it."""
ADDRESS = "RAY_API_SERVER_ADDRESS"
EXCLUDES = ("/.git", "/.venv", "/runs", "/.frameworks", "node_modules", "__pycache__", ".*_cache", "*.egg-info")
"""Of the working directory, what no job needs; what .gitignore names is left out too."""
RESUMES = "lightning_ray_resumes"
"""Metadata: the job that this one goes on with."""
STEP = re.compile(r"^step (\d+)/(\d+)\s+reward\s+(\S+)", re.MULTILINE)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """One job. ``reward`` is that of its last step; ``started`` is in seconds since the epoch."""

    id: str
    state: str
    entrypoint: str
    started: float | None = None
    step: int | None = None
    steps: int | None = None
    reward: float | None = None
    resumes: str | None = None
    message: str | None = None
    """What Ray says of its state."""

    @property
    def run(self) -> str:
        """The run's name, if the command tells it; otherwise its script."""
        words = training(self.entrypoint) or []
        return words[words.index("--name") + 1] if "--name" in words[:-1] else next(iter(words), "")

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        return self.state in ENDED


class Jobs:
    """The jobs of a cluster. ``address`` is its dashboard's (http://HEAD:8265); by default that of Ray's environment.

    Raises ConfigError if nobody answers there, or there is no such job.
    """

    def __init__(self, address: str | None = None) -> None:
        from ray.job_submission import JobSubmissionClient

        if address is not None:
            os.environ[ADDRESS] = address  # which Ray's client puts before what it is given
        where = address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or "this machine's Ray"
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no job server at {where}: {_first(error)}; give --address http://HEAD:8265, that of its dashboard"
            ) from error

    def submit(
        self,
        arguments: Sequence[str],
        working_dir: Path,
        variables: Mapping[str, str] | None = None,
        resumes: str | None = None,
    ) -> str:
        """Run ``lightning-ray train`` with these arguments in a copy of the working directory; returns the job's id."""
        check_runs_dir(arguments)
        if not working_dir.is_dir():
            raise ConfigError(
                f"--working-dir {working_dir}: no such folder; give the one that the training script is in"
            )
        environment = {
            "working_dir": str(working_dir),
            "excludes": [*EXCLUDES],
            "env_vars": {WAIT: str(STOP_SECONDS), **(variables or {})},
        }
        with _refused(f"{working_dir} could not be submitted"):
            return self._client.submit_job(
                entrypoint=shlex.join(["lightning-ray", "train", *arguments]),
                runtime_env=environment,
                metadata={} if resumes is None else {RESUMES: resumes},
            )

    def all(self) -> list[Job]:
        """Those that run, or ran, ``lightning-ray train``, the oldest first."""
        ours = [info for info in self._client.list_jobs() if info.submission_id and training(info.entrypoint)]
        return [self._job(info) for info in sorted(ours, key=lambda info: info.start_time or 0)]

    def get(self, job: str) -> Job:
        """One of them."""
        with _refused(f"job {job}"):
            return self._job(self._client.get_job_info(job))

    def stop(self, job: str, seconds: float = STOP_SECONDS + 30.0) -> Job:
        """Ask it to stop, and wait for its end. Raises InfrastructureError if it does not come to it."""
        with _refused(f"job {job}"):
            self._client.stop_job(job)
        deadline = time.monotonic() + seconds
        while self._state(job) not in ENDED:
            if time.monotonic() > deadline:
                raise InfrastructureError(f"job {job} has not ended {seconds:.0f} s after it was stopped; see its log")
            time.sleep(0.5)
        return self.get(job)

    def resume(self, job: str, working_dir: Path) -> str:
        """Submit it anew, with ``--resume``; returns the new id."""
        known = self.get(job)
        words = training(known.entrypoint)
        if not known.ended:
            raise ConfigError(f"job {job} is {known.state}: stop it first (lightning-ray stop {job}), or let it work")
        if words is None:
            raise ConfigError(f"job {job} ran {known.entrypoint!r}, which is no `lightning-ray train`")
        runtime = self._client.get_job_info(job).runtime_env or {}
        return self.submit(resuming(words), working_dir, runtime.get("env_vars"), job)

    async def follow(self, job: str) -> Job:
        """Print its log until its end."""
        async for text in self._client.tail_job_logs(job):
            print(text, end="", flush=True)
        return self.get(job)

    def logs(self, job: str) -> str:
        """All that it told."""
        with _refused(f"job {job}"):
            return str(self._client.get_job_logs(job))

    def _state(self, job: str) -> str:
        return str(self._client.get_job_status(job).value)

    def _job(self, info: Any) -> Job:
        told = STEP.findall(self.logs(info.submission_id))
        step, steps, reward = told[-1] if told else (None, None, None)
        return Job(
            info.submission_id,
            str(info.status.value),
            info.entrypoint,
            None if info.start_time is None else info.start_time / 1e3,
            None if step is None else int(step),
            None if steps is None else int(steps),
            None if reward in (None, "-") else float(reward),
            (info.metadata or {}).get(RESUMES),
            info.message,
        )


def training(entrypoint: str) -> list[str] | None:
    """The arguments that an entrypoint gives to ``lightning-ray train``; None of any other."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return None
    for place, word in enumerate(words[:-1]):
        if words[place + 1] == "train" and (word.endswith("lightning-ray") or word == "lightning_ray.cli"):
            return words[place + 2 :]
    return None


def resuming(arguments: Sequence[str]) -> list[str]:
    """The same arguments, with ``--resume``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = [word for word in arguments[:end] if word != "--resume"]
    return [*own, "--resume", *arguments[end:]]


def check_runs_dir(arguments: Sequence[str]) -> None:
    """Raises ConfigError unless the run is kept where it outlives the job's copy of the working directory."""
    own = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    given = [word.partition("=")[2] for word in own if word.startswith("--runs-dir=")]
    given += [after for word, after in pairwise(own) if word == "--runs-dir"]
    if not given or not (is_url(given[-1]) or Path(given[-1]).is_absolute()):
        raise ConfigError(
            f"--runs-dir {given[-1] if given else 'runs'}: a job works in a copy of the working directory, which Ray "
            "removes; give a folder that is there on the cluster (/shared/runs), or a URL (s3://bucket/runs)"
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{what}: {_first(error)}") from error


def _first(error: Exception) -> str:
    """What an error of Ray's client says, without the server's stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Traceback" not in line]
    return lines[-1] if "status code" in str(error) and lines else (lines or [type(error).__name__])[0]
