"""Agents that are programs, in any language: ``CommandAgent(["node", "agent.js", "{task.question}"])``.

A program finds its model where OpenAI's and Anthropic's clients look for it (OPENAI_BASE_URL, ANTHROPIC_BASE_URL, ...),
its task in its arguments, in LIGHTNING_TASK or in the file LIGHTNING_TASK_FILE, and says its reward by its exit, in a
file, on its last line or over HTTP; or a Python function judges what it left. Its output is kept with the attempt.
This file puts together what ``lightning_ray.programs`` does; when and how often a program is tried is the runner's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shlex
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_ray.agent import LitAgent
from lightning_ray.emitter.recorder import recorder
from lightning_ray.errors import AgentError
from lightning_ray.programs.container import container_command, find_engine, removal_command
from lightning_ray.programs.environment import (
    REPORT_TOKEN,
    attempt_environment,
    base_environment,
    engine_environment,
    model_environment,
)
from lightning_ray.programs.folder import AttemptFolder, make_folder
from lightning_ray.programs.outcome import KILLED, PROGRAM_SPAN, Outcome, check_infrastructure
from lightning_ray.programs.process import NotStartedError, Program, Specification
from lightning_ray.programs.report import Reports, report_servers
from lightning_ray.programs.reward import WAYS, RewardFunction, RewardWay, judge
from lightning_ray.programs.template import Template, as_text
from lightning_ray.tracing import get_active_tracer
from lightning_ray.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Rollout

MAX_SHOWN_COMMAND = 200


class CommandAgent(LitAgent[Any]):
    """An agent that is a program. It runs once for each attempt, many at once, each in its own process group.

    ``command`` is a list of templates: ``{task}``, ``{task.key}``, ``{task_file}``, ``{llm.endpoint}``,
    ``{llm.model}``, ``{llm.api_key}``, ``{prompt_template}``, ``{rollout_id}``, ``{attempt_id}``; what is no text
    becomes JSON, and literal braces are doubled. With ``shell=True`` it is one template for ``sh``, in which each value
    is quoted.

    - ``reward``: ``"exit"``, ``"file"``, ``"http"``, ``"stdout"``, a function ``(task, outcome)``, async or not, or
      None for agents without; ``"auto"`` takes what came over HTTP or is in the file. ``primary_key`` names the
      dimension that is trained on where the reward has several.
    - ``env``: more variables, as templates. ``inherit_env``: names of the runner's variables to pass on besides the
      clean base (``programs.environment.BASE``), or True for all.
    - ``cwd``: a folder whose copy each attempt works in; with ``in_place=True``, the folder itself. Without it an
      attempt starts in an empty folder, and arguments that name a file of the current folder become its absolute path.
    - ``keep_folders``: where the attempts' folders are kept; without it they are removed.
    - ``stdin``: a template for what the program reads; nothing by default.
    - ``timeout_seconds``, ``memory_bytes`` (address space of each process), ``cpu_seconds``: limits of an attempt. A
      program is ended by SIGTERM and, ``grace_seconds`` later, SIGKILL, with all its processes.
    - ``image``: a container image to run in, by ``engine`` (docker or podman, whichever is there). ``runtime_env``: the
      environment in Ray's sense that the runners of this agent are to have. A Python program can have its own
      environment without either: name that environment's interpreter as the command.

    Raises AgentError for a command, template, way or folder that cannot be.
    """

    def __init__(
        self,
        command: Sequence[str] | str,
        *,
        shell: bool = False,
        reward: RewardWay | RewardFunction | None = "auto",
        primary_key: str | None = None,
        env: Mapping[str, str] | None = None,
        inherit_env: bool | Sequence[str] = False,
        cwd: str | os.PathLike[str] | None = None,
        in_place: bool = False,
        keep_folders: str | os.PathLike[str] | None = None,
        stdin: str | None = None,
        timeout_seconds: float | None = None,
        grace_seconds: float = 2.0,
        memory_bytes: int | None = None,
        cpu_seconds: int | None = None,
        image: str | None = None,
        engine: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ):
        check_command(command, shell)
        if not callable(reward) and reward is not None and reward not in WAYS:
            raise AgentError(
                f"reward={reward!r}; it is one of {', '.join(WAYS)}, a function of (task, outcome), or None"
            )
        if isinstance(inherit_env, str):
            raise AgentError(f"inherit_env={inherit_env!r} must be True, False or a list of names")
        parts = [command] if isinstance(command, str) else list(command)
        self._command = [Template(part, f"argument {index} of the command") for index, part in enumerate(parts)]
        self._env = {name: Template(text, f"env[{name!r}]") for name, text in (env or {}).items()}
        self._stdin = None if stdin is None else Template(stdin, "stdin")
        self._shell = shell
        self._reward = reward
        self._primary_key = primary_key
        self._inherit_env = inherit_env
        self._cwd = None if cwd is None else Path(cwd).absolute()
        if self._cwd is not None and not self._cwd.is_dir():
            raise AgentError(f"cwd={os.fspath(cwd or '')!r} is no folder")
        if in_place and cwd is None:
            raise AgentError("in_place=True needs cwd=, the folder to work in")
        self._in_place = in_place
        self._keep_folders = None if keep_folders is None else Path(keep_folders).absolute()
        self._home = Path.cwd()
        self._timeout_seconds = positive("timeout_seconds", timeout_seconds)
        self._grace_seconds = grace_seconds
        self._memory_bytes = positive("memory_bytes", memory_bytes)
        self._cpu_seconds = positive("cpu_seconds", cpu_seconds)
        self._image = image
        self._engine = engine
        self.runtime_env = dict(runtime_env or {})
        """For the runner's process: Ray applies it when the runner starts."""
        self.__name__ = shown(parts)

    async def rollout_async(self, task: Any, resources: NamedResources, rollout: Rollout) -> float | None:
        """Run the program on one task and return what it earned.

        Raises AgentError if it cannot be started, ends badly or says no reward where one is due, and
        InfrastructureError if something outside of it ended it.
        """
        attempt_id = rollout.attempt.attempt_id if isinstance(rollout, AttemptedRollout) else "none"
        text = as_text(task)
        async with self._folder(text, attempt_id) as folder:
            values = self._values(task, resources, rollout, attempt_id, folder)
            command = self._filled(values)
            outcome, reported = await self._run(command, values, text, folder)
            check_infrastructure(shown(command), outcome, self._image is not None)
            return await judge(
                self._reward, self._primary_key, shown(command), task, outcome, folder.reward_file, reported
            )

    async def _run(
        self, command: list[str], values: Mapping[str, Any], text: str, folder: AttemptFolder
    ) -> tuple[Outcome, int]:
        """Run the program under a span of its own; how it ended, and how many rewards it reported."""
        server = report_servers.here()
        tracer = recorder("the program", propagate=get_active_tracer() is not None)
        with tracer.operation_context(PROGRAM_SPAN, attributes={f"{PROGRAM_SPAN}.command": command}) as recording:
            reports = Reports(self._primary_key)
            ids = values["rollout_id"], values["attempt_id"]
            own = attempt_environment(*ids, text, folder.task_file, folder.reward_file, server.url, reports.token)
            specification = self._specification(command, values, own, folder)
            program = Program(specification, b"" if self._stdin is None else self._stdin.fill(values).encode())
            try:
                with server.hearing(reports):
                    await program.run(self._timeout_seconds)
            except NotStartedError as error:
                raise not_started(command, error) from None
            finally:
                outcome = self._outcome(program, folder)
                recording.record_attributes(outcome.attributes())
            recording.record_status("OK" if outcome.ok else "ERROR", None if outcome.ok else outcome.words)
        return outcome, reports.rewards

    @contextlib.asynccontextmanager
    async def _folder(self, task: str, attempt_id: str) -> AsyncIterator[AttemptFolder]:
        arguments = (task, self._cwd, self._in_place, self._keep_folders, attempt_id)
        if self._cwd is None or self._in_place:
            folder = make_folder(*arguments)
        else:
            folder = await finished(asyncio.to_thread(make_folder, *arguments))
        try:
            yield folder
        finally:
            if self._keep_folders is None:
                await asyncio.shield(asyncio.to_thread(folder.remove))

    def _values(
        self, task: Any, resources: NamedResources, rollout: Rollout, attempt_id: str, folder: AttemptFolder
    ) -> dict[str, Any]:
        """What placeholders stand for."""
        llm = next((value for value in resources.values() if isinstance(value, LLM)), None)
        if isinstance(llm, ProxyLLM) and isinstance(rollout, AttemptedRollout):
            llm = llm.with_attempted_rollout(rollout)
        prompt = next((value for value in resources.values() if isinstance(value, PromptTemplate)), None)
        return {
            "task": task,
            "task_file": str(folder.task_file),
            "llm": llm,
            "prompt_template": prompt and prompt.template,
            "rollout_id": rollout.rollout_id,
            "attempt_id": attempt_id,
        }

    def _filled(self, values: Mapping[str, Any]) -> list[str]:
        """The command for one attempt."""
        if self._shell:
            return ["sh", "-c", self._command[0].fill(values, quote=True)]
        filled = [part.fill(values) for part in self._command]
        if self._cwd is None and self._image is None:
            is_path = [index > 0 or "/" in filled[0] for index in range(len(filled))]
            literal = [part.literal is not None for part in self._command]
            return [
                self._located(word) if p and k else word for word, p, k in zip(filled, is_path, literal, strict=True)
            ]
        return filled

    def _located(self, word: str) -> str:
        """A file of the folder where the agent was made, or where the runner is, by its absolute path."""
        if not word or os.path.isabs(word):
            return word
        with contextlib.suppress(OSError, ValueError):
            return next((str(base / word) for base in (self._home, Path.cwd()) if (base / word).is_file()), word)
        return word

    def _specification(
        self, command: list[str], values: Mapping[str, Any], own: Mapping[str, str], folder: AttemptFolder
    ) -> Specification:
        """What the program is started as."""
        llm = values["llm"]
        given = {
            **({} if llm is None else model_environment(llm)),
            **own,
            **{name: template.fill(values) for name, template in self._env.items()},
            REPORT_TOKEN: own[REPORT_TOKEN],
        }
        if self._image is not None:
            return self._in_container(command, given, folder)
        env = {**base_environment(self._inherit_env), "TMPDIR": str(folder.temporary), "PWD": str(folder.work), **given}
        return Specification(
            argv=command,
            executable=found_executable(command[0], folder.work, env.get("PATH", os.defpath)),
            env=env,
            cwd=str(folder.work),
            mark=f"{REPORT_TOKEN}={given[REPORT_TOKEN]}",
            grace_seconds=self._grace_seconds,
            memory_bytes=self._memory_bytes,
            cpu_seconds=self._cpu_seconds,
            scratch=self._scratch(folder),
        )

    def _scratch(self, folder: AttemptFolder) -> str | None:
        return str(folder.root) if self._keep_folders is None else None

    def _in_container(self, command: list[str], given: Mapping[str, str], folder: AttemptFolder) -> Specification:
        engine = find_engine(self._engine)
        name = f"lightning-{secrets.token_hex(8)}"
        passed = {**base_of_container(self._inherit_env), "TMPDIR": str(folder.temporary), **given}
        line = container_command(
            engine,
            self._image or "",
            command,
            name=name,
            variables=passed,
            folders=[folder.root, *([folder.work] if self._in_place else [])],
            workdir=folder.work if self._cwd is not None else None,
            interactive=self._stdin is not None,
            memory_bytes=self._memory_bytes,
            cpu_seconds=self._cpu_seconds,
        )
        return Specification(
            argv=line,
            executable=engine,
            env=engine_environment(passed),
            cwd=str(folder.work),
            mark=f"{REPORT_TOKEN}={given[REPORT_TOKEN]}",
            grace_seconds=self._grace_seconds,
            cleanup=removal_command(engine, name),
            scratch=self._scratch(folder),
        )

    def _outcome(self, program: Program, folder: AttemptFolder) -> Outcome:
        outcome = Outcome(
            exit_code=None,
            stdout=program.stdout,
            stderr=program.stderr,
            files=folder.work,
            duration_s=program.duration_s,
            timed_out=program.timed_out,
            cpu_limit_s=self._cpu_seconds,
        )
        if (ended := program.ended) is None:
            return outcome
        wrapped = self._shell or self._image is not None
        killed = ended.code == -9 or (wrapped and ended.code == KILLED)
        spent = self._cpu_seconds is not None and ended.cpu_seconds >= self._cpu_seconds
        return replace(
            outcome.with_code(ended.code),
            cpu_s=ended.cpu_seconds,
            max_rss_bytes=ended.max_rss_bytes,
            killed_from_outside=killed and not ended.stopped and not spent,
        )


def check_command(command: Sequence[str] | str, shell: bool) -> None:
    """Raises AgentError unless it is a list of words, or text for a shell."""
    if shell and not isinstance(command, str):
        raise AgentError("with shell=True the command is one text; without it, a list of words")
    if isinstance(command, str) and not shell:
        raise AgentError(f"the command {command!r:.200} is one text; give a list of words, or shell=True")
    if not command or (not shell and not command[0]):
        raise AgentError('the command is empty; it is a list such as ["node", "agent.js", "{task.question}"]')


def not_started(command: Sequence[str], error: NotStartedError) -> AgentError:
    """The error of a program that the operating system did not start."""
    size = sum(len(word.encode()) for word in command)
    hint = f"; its arguments have {size} bytes: pass {{task_file}} instead" if error.errno == errno.E2BIG else ""
    return AgentError(f"{shown(command)} could not be started: {error}{hint}")


def positive(name: str, value: Any) -> Any:
    """The value. Raises AgentError if it is not above 0."""
    if value is not None and not value > 0:
        raise AgentError(f"{name}={value!r} must be above 0; leave it out for no limit")
    return value


def shown(command: Sequence[str]) -> str:
    """The command in messages."""
    text = shlex.join(command)
    return text if len(text) <= MAX_SHOWN_COMMAND else f"{text[:MAX_SHOWN_COMMAND]}..."


def found_executable(name: str, cwd: Path, path: str) -> str:
    """Path of a program, looked for as the system would. Raises AgentError."""
    if "/" in name:
        file = cwd / name
        if not file.is_file():
            raise AgentError(f"there is no program {str(file)!r}")
        if not os.access(file, os.X_OK):
            raise AgentError(f"{str(file)!r} is not executable: chmod +x, or name its interpreter first")
        return str(file)
    if (found := shutil.which(name, path=path)) is None:
        raise AgentError(f"there is no program {name!r} on PATH={path!r} of this machine")
    return found


def base_of_container(inherit: bool | Sequence[str]) -> dict[str, str]:
    """The runner's variables that go into a container: those named, as its PATH and HOME are its own."""
    names = [] if isinstance(inherit, bool) else inherit
    return {name: os.environ[name] for name in names if name in os.environ}


async def finished(work: Any) -> Any:
    """Its result; if this task is cancelled, once the work is done, so that nothing of it is left behind."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        (await task).remove()
        raise
