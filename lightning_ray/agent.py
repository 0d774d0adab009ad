"""What a user writes: a function (``@rollout``) or a class (``LitAgent``) that plays one task and returns its reward.

The parameters say what the agent needs: ``task``, then ``llm`` or ``prompt_template`` (found among the resources
by type, whatever their names), and ``rollout`` if wanted. Names and meaning as in Agent Lightning 0.3, which has no
``llms``: all models by name, where there are several. What may be returned is ``results``'s.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from lightning_ray.errors import AgentError
from lightning_ray.results import RolloutRawResult
from lightning_ray.tracing.tracer import OtelTracer, Tracer
from lightning_ray.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Resource, Rollout

if TYPE_CHECKING:
    from lightning_ray.runner import Runner
    from lightning_ray.trainer import Trainer

T = TypeVar("T")
R = TypeVar("R", bound=Resource)
RolloutResult = RolloutRawResult
"""A reward, rewards by name, spans, or None when rewards were emitted (or there is none)."""


class SignatureError(AgentError, NotImplementedError):
    """A function whose parameters no one can fill."""


class WrongModeError(AgentError, RuntimeError):
    """An agent that is async was played as one that is not, or the other way round."""


class LitAgent(Generic[T]):
    """Base class of agents: override ``rollout`` or ``rollout_async`` (and ``training_``/``validation_`` variants)."""

    trained_agents: str | None = None
    _trainer_ref: weakref.ReferenceType[Trainer] | None = None
    _runner_ref: weakref.ReferenceType[Runner] | None = None

    def __init__(self, *, trained_agents: str | None = None) -> None:
        """``trained_agents`` is deprecated: say ``agent_match`` to the adapter."""
        if trained_agents is not None:
            warnings.warn(
                "trained_agents is deprecated; give agent_match to the adapter", DeprecationWarning, stacklevel=2
            )
        self.trained_agents = trained_agents

    def __getstate__(self) -> dict[str, Any]:
        """An agent travels without its trainer and runner."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_trainer_ref", "_runner_ref")}

    def is_async(self) -> bool:
        """Whether the agent is played by its ``*_async`` methods."""
        names = ("rollout_async", "training_rollout_async", "validation_rollout_async")
        return any(getattr(type(self), name) is not getattr(LitAgent, name) for name in names)

    def set_trainer(self, trainer: Trainer) -> None:
        """Attach the trainer; the agent does not keep it alive."""
        self._trainer_ref = weakref.ref(trainer)

    def get_trainer(self) -> Trainer:
        """The trainer. Raises AgentError if there is none, or it is gone."""
        return _alive(self._trainer_ref, self, "trainer")

    @property
    def trainer(self) -> Trainer:
        """``get_trainer()``."""
        return self.get_trainer()

    def set_runner(self, runner: Runner) -> None:
        """Attach the runner; the agent does not keep it alive."""
        self._runner_ref = weakref.ref(runner)

    def get_runner(self) -> Runner:
        """The runner. Raises AgentError if there is none, or it is gone."""
        return _alive(self._runner_ref, self, "runner")

    @property
    def runner(self) -> Runner:
        """``get_runner()``."""
        return self.get_runner()

    def get_tracer(self) -> Tracer:
        """The tracer of the runner or trainer, otherwise one that records in the attempt at work."""
        for reference in (self._runner_ref, self._trainer_ref):
            owner = reference() if reference is not None else None
            if (tracer := getattr(owner, "tracer", None)) is not None:
                return tracer
        return _TRACER

    @property
    def tracer(self) -> Tracer:
        """``get_tracer()``."""
        return self.get_tracer()

    def on_rollout_start(self, task: Any, runner: Runner, tracer: Tracer) -> None:
        """Deprecated, and never called: write a ``Hook``."""

    def on_rollout_end(self, task: Any, rollout: Rollout, runner: Runner, tracer: Tracer) -> None:
        """Deprecated, and never called: write a ``Hook``."""

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task."""
        raise NotImplementedError(f"{type(self).__name__} defines neither rollout nor rollout_async")

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task."""
        raise NotImplementedError(f"{type(self).__name__} defines neither rollout nor rollout_async")

    def training_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task in training; ``rollout`` unless overridden."""
        return self.rollout(task, resources, rollout)

    def validation_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task in validation; ``rollout`` unless overridden."""
        return self.rollout(task, resources, rollout)

    async def training_rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task in training; ``rollout_async`` unless overridden."""
        return await self.rollout_async(task, resources, rollout)

    async def validation_rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task in validation; ``rollout_async`` unless overridden."""
        return await self.rollout_async(task, resources, rollout)


_TRACER = OtelTracer()


def _alive(reference: weakref.ReferenceType[Any] | None, agent: LitAgent[Any], what: str) -> Any:
    owner = reference() if reference is not None else None
    if owner is None:
        gone = "has none" if reference is None else "is gone"
        raise AgentError(f"the {what} of agent {name_of(agent)!r} was asked for, and the agent's {what} {gone}")
    return owner


def name_of(agent: Any) -> str:
    """What to call an agent in a message: its function's name, otherwise its class's."""
    return getattr(agent, "__name__", type(agent).__name__)


def contained(agent: Any, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of an agent that is not async, in a thread of a pool.

    A StopIteration out of the agent becomes an AgentError: a future cannot hold one, so whoever waits for the
    agent would wait for ever.
    """
    try:
        return method(*arguments)
    except StopIteration as error:
        raise AgentError(
            f"agent {name_of(agent)!r} let a StopIteration out, of next() without a default for example"
        ) from error


class FunctionalLitAgent(LitAgent[T]):
    """An agent made of one function; calling it calls the function."""

    def __init__(self, rollout_func: Callable[..., Any], *, strip_proxy: bool = True) -> None:
        """With ``strip_proxy=False`` the function gets a ProxyLLM itself, not its attempt's address."""
        super().__init__()
        functools.update_wrapper(self, rollout_func)
        self.function = rollout_func
        self.strip_proxy = strip_proxy
        parameters = inspect.signature(rollout_func).parameters
        self.needs = {name: kind for name, kind in RESOURCES.items() if name in parameters}
        self.wants_llms = ALL_MODELS in parameters
        self.wants_rollout = "rollout" in parameters
        self.__name__ = getattr(rollout_func, "__name__", type(rollout_func).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def is_async(self) -> bool:
        """Whether the function is a coroutine function, or an object called as one."""
        called = type(self.function).__call__ if not inspect.isroutine(self.function) else None
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(called)

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task with the function. Raises WrongModeError if it is async."""
        if self.is_async():
            raise WrongModeError(f"agent {self.__name__!r} is async: await its rollout_async()")
        return self.function(task, **self._arguments(resources, rollout))

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task with the coroutine function. Raises WrongModeError if it is not async."""
        if not self.is_async():
            raise WrongModeError(f"agent {self.__name__!r} is not async: call its rollout()")
        return await self.function(task, **self._arguments(resources, rollout))

    def _arguments(self, resources: NamedResources, rollout: Rollout) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for parameter, kind in self.needs.items():
            arguments[parameter] = self._given(first_of(resources, kind, parameter), rollout)
        if self.wants_llms:
            found = {name: each for name, each in resources.items() if isinstance(each, LLM)}
            arguments[ALL_MODELS] = {name: self._given(each, rollout) for name, each in found.items()}
        if self.wants_rollout:
            arguments["rollout"] = rollout
        return arguments

    def _given(self, resource: Resource, rollout: Rollout) -> Resource:
        return self._address(resource, rollout) if self.strip_proxy and isinstance(resource, ProxyLLM) else resource

    def _address(self, llm: ProxyLLM, rollout: Rollout) -> LLM:
        if not isinstance(rollout, AttemptedRollout):
            raise AgentError(
                f"rollout {rollout.rollout_id!r} has no attempt, whose address agent {self.__name__!r} needs; "
                "give an AttemptedRollout, or decorate with llm_rollout(strip_proxy=False)"
            )
        return llm.with_attempted_rollout(rollout)


def first_of(resources: NamedResources, kind: type[R], parameter: str) -> R:
    """The first resource of a type. Raises AgentError naming the parameter that wants it."""
    for resource in resources.values():
        if isinstance(resource, kind):
            return resource
    raise AgentError(
        f"the agent's parameter {parameter!r} needs a resource of type {kind.__name__}; the resources are "
        f"{ {name: type(value).__name__ for name, value in resources.items()} }"
    )


RESOURCES: Mapping[str, type[Resource]] = {"llm": LLM, "prompt_template": PromptTemplate}
"""Parameter -> what it is given."""
ALL_MODELS = "llms"
"""The parameter that is given all models by name."""


def rollout(function: Callable[..., Any]) -> FunctionalLitAgent[Any]:
    """Make an agent of ``[async] (task, llm | llms | prompt_template[, rollout])``.

    Raises AgentError when the parameters are none of these.
    """
    return _made(function, (*RESOURCES, ALL_MODELS), "'llm' or 'prompt_template' (or both), or 'llms'")


def _made(
    function: Callable[..., Any], wanted: Iterable[str], words: str, strip_proxy: bool = True
) -> FunctionalLitAgent[Any]:
    """The agent, if its parameters are ``task``, then one of ``wanted``; what else it has can be filled."""
    parameters = inspect.signature(function).parameters
    fillable = {"task", "rollout", ALL_MODELS, *RESOURCES}
    unknown = [
        name
        for name, p in parameters.items()
        if name not in fillable and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unnamed = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and name != "task"]
    found = any(name in parameters for name in wanted)
    if next(iter(parameters), None) != "task" or not found or unknown or unnamed:
        raise SignatureError(
            f"agent {getattr(function, '__name__', function)!r} has parameters {list(parameters)}; "
            f"it needs 'task' first, then {words}, and 'rollout' if wanted; others need a default"
        )
    return FunctionalLitAgent(function, strip_proxy=strip_proxy)


Decorator = Callable[[Callable[..., Any]], FunctionalLitAgent[Any]]


@overload
def llm_rollout(func: Callable[..., Any]) -> FunctionalLitAgent[Any]: ...


@overload
def llm_rollout(func: None = None, *, strip_proxy: bool = True) -> Decorator: ...


def llm_rollout(
    func: Callable[..., Any] | None = None, *, strip_proxy: bool = True
) -> FunctionalLitAgent[Any] | Decorator:
    """Make an agent of ``[async] (task, llm[, rollout])``; with ``strip_proxy=False`` it gets the ProxyLLM itself.

    Raises AgentError when the parameters are none of these.
    """
    if func is None:
        return lambda given: _made(given, ("llm",), "'llm'", strip_proxy)
    return _made(func, ("llm",), "'llm'", strip_proxy)


@overload
def prompt_rollout(func: Callable[..., Any]) -> FunctionalLitAgent[Any]: ...


@overload
def prompt_rollout(func: None = None) -> Decorator: ...


def prompt_rollout(func: Callable[..., Any] | None = None) -> FunctionalLitAgent[Any] | Decorator:
    """Make an agent of ``[async] (task, prompt_template[, rollout])``.

    Raises AgentError when the parameters are none of these.
    """
    if func is None:
        return lambda given: _made(given, ("prompt_template",), "'prompt_template'")
    return _made(func, ("prompt_template",), "'prompt_template'")
