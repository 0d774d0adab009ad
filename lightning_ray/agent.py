"""What a user writes: a function (``@rollout``) or a class (``LitAgent``) that plays one task and returns its reward.

The parameters say what the agent needs: ``task``, then ``llm`` or ``prompt_template`` (found among the resources
by type, whatever their names), and ``rollout`` if wanted. Names and meaning as in Agent Lightning 0.3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from lightning_ray.errors import AgentError
from lightning_ray.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Resource, Rollout

T = TypeVar("T")
R = TypeVar("R", bound=Resource)
RolloutResult = float | None
"""A reward, or None when rewards were emitted (or there is none)."""


class LitAgent(Generic[T]):
    """Base class of agents: override ``rollout`` or ``rollout_async`` (and ``training_``/``validation_`` variants)."""

    def is_async(self) -> bool:
        """Whether the agent is played by its ``*_async`` methods."""
        names = ("rollout_async", "training_rollout_async", "validation_rollout_async")
        return any(getattr(type(self), name) is not getattr(LitAgent, name) for name in names)

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


class FunctionalLitAgent(LitAgent[T]):
    """An agent made of one function; calling it calls the function."""

    def __init__(self, function: Callable[..., Any], needs: Mapping[str, type[Resource]], strip_proxy: bool = True):
        self.function = function
        self.needs = dict(needs)
        self.strip_proxy = strip_proxy
        self.wants_rollout = "rollout" in inspect.signature(function).parameters
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        return inspect.iscoroutinefunction(self.function)

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task with the function."""
        return self.function(task, **self._arguments(resources, rollout))

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutResult:
        """Play one task with the coroutine function."""
        return await self.function(task, **self._arguments(resources, rollout))

    def _arguments(self, resources: NamedResources, rollout: Rollout) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for parameter, kind in self.needs.items():
            resource: Resource = first_of(resources, kind, parameter)
            if self.strip_proxy and isinstance(resource, ProxyLLM) and isinstance(rollout, AttemptedRollout):
                resource = resource.with_attempted_rollout(rollout)
            arguments[parameter] = resource
        if self.wants_rollout:
            arguments["rollout"] = rollout
        return arguments


def first_of(resources: NamedResources, kind: type[R], parameter: str) -> R:
    """The first resource of a type. Raises AgentError naming the parameter that wants it."""
    for resource in resources.values():
        if isinstance(resource, kind):
            return resource
    raise AgentError(
        f"the agent's parameter {parameter!r} needs a resource of type {kind.__name__}; the resources are "
        f"{ {name: type(value).__name__ for name, value in resources.items()} }"
    )


_RESOURCES: dict[str, type[Resource]] = {"llm": LLM, "prompt_template": PromptTemplate}


def rollout(function: Callable[..., Any]) -> FunctionalLitAgent[Any]:
    """Make an agent of ``[async] (task, llm | prompt_template[, rollout])``.

    Raises AgentError when the parameters are none of these.
    """
    return _made(function, _RESOURCES, "'llm' or 'prompt_template' (or both)")


def _made(
    function: Callable[..., Any], kinds: Mapping[str, type[Resource]], wanted: str, strip_proxy: bool = True
) -> FunctionalLitAgent[Any]:
    """The agent, if its parameters are ``task``, then some of ``kinds`` and ``rollout``; others have defaults."""
    parameters = inspect.signature(function).parameters
    needs = {name: kinds[name] for name in parameters if name in kinds}
    given = {"task", "rollout", *kinds}
    unknown = [name for name, p in parameters.items() if name not in given and p.default is p.empty]
    if next(iter(parameters), None) != "task" or not needs or unknown:
        raise AgentError(
            f"agent {getattr(function, '__name__', function)!r} has parameters {list(parameters)}; "
            f"it needs 'task' first, then {wanted}, and 'rollout' if wanted; others need a default"
        )
    return FunctionalLitAgent(function, needs, strip_proxy)


def llm_rollout(
    function: Callable[..., Any] | None = None, *, strip_proxy: bool = True
) -> FunctionalLitAgent[Any] | Callable[[Callable[..., Any]], FunctionalLitAgent[Any]]:
    """Make an agent of ``[async] (task, llm[, rollout])``; with ``strip_proxy=False`` it gets the ProxyLLM itself.

    Raises AgentError when the parameters are none of these.
    """
    if function is None:
        return lambda given: _made(given, {"llm": LLM}, "'llm'", strip_proxy)
    return _made(function, {"llm": LLM}, "'llm'", strip_proxy)


def prompt_rollout(function: Callable[..., Any]) -> FunctionalLitAgent[Any]:
    """Make an agent of ``[async] (task, prompt_template[, rollout])``.

    Raises AgentError when the parameters are none of these.
    """
    return _made(function, {"prompt_template": PromptTemplate}, "'prompt_template'")
