"""Agents as users write them: functions and classes, and what they are given."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import cloudpickle
import pytest

import lightning_ray as lr
from lightning_ray.agent import contained
from lightning_ray.types import AttemptedRollout, ProxyLLM

ATTEMPT = lr.Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0)
ROLLOUT = AttemptedRollout(rollout_id="ro-1", input={}, start_time=0.0, attempt=ATTEMPT)
PROXY = ProxyLLM(endpoint="http://host/v1", model="m", api_key="k", sampling_parameters={"temperature": 1.0})
PROMPT = lr.PromptTemplate(template="{x}!")
RESOURCES: Any = {"prompt": PROMPT, "whatever": PROXY, "second": lr.LLM(endpoint="http://other/v1", model="n")}


async def test_a_coroutine_function_is_played_with_its_attempts_own_address() -> None:
    @lr.rollout
    async def agent(task: str, llm: lr.LLM) -> Any:
        """Docs."""
        return task, llm

    assert isinstance(agent, lr.FunctionalLitAgent) and agent.is_async()
    assert (agent.__name__, agent.__doc__) == ("agent", "Docs.")
    task, llm = await agent.training_rollout_async("t", RESOURCES, ROLLOUT)  # type: ignore[misc]
    assert task == "t" and type(llm) is lr.LLM
    assert llm.endpoint == "http://host/rollout/ro-1/attempt/at-1/v1"
    assert (llm.model, llm.api_key, llm.sampling_parameters) == ("m", "k", {"temperature": 1.0})
    assert await agent.validation_rollout_async("t", RESOURCES, ROLLOUT) == (task, llm)


def test_a_function_gets_resources_by_type_and_the_rollout() -> None:
    @lr.rollout
    def agent(task: str, prompt_template: lr.PromptTemplate, llm: lr.LLM, rollout: lr.Rollout) -> Any:
        return task, prompt_template, llm, rollout

    assert not agent.is_async()
    task, prompt, llm, rollout = agent.training_rollout("t", RESOURCES, ROLLOUT)  # type: ignore[misc]
    assert (task, prompt, rollout) == ("t", PROMPT, ROLLOUT) and llm.model == "m"
    assert agent.validation_rollout("t", RESOURCES, ROLLOUT)[1] is PROMPT  # type: ignore[index]


def test_calling_an_agent_calls_the_function() -> None:
    @lr.rollout
    def agent(task: int, llm: lr.LLM, factor: int = 2) -> float:
        return task * factor

    assert agent(3, RESOURCES["second"]) == 6
    assert agent(3, llm=None, factor=5) == 15
    assert agent.rollout(3, RESOURCES, ROLLOUT) == 6


def test_the_proxy_itself_is_given_on_request() -> None:
    @lr.llm_rollout(strip_proxy=False)
    def agent(task: Any, llm: lr.LLM) -> Any:
        return llm

    assert agent.rollout(None, RESOURCES, ROLLOUT) is PROXY  # type: ignore[union-attr]


def test_a_prompt_agent_gets_the_prompt() -> None:
    @lr.prompt_rollout
    def agent(task: Any, prompt_template: lr.PromptTemplate) -> Any:
        return prompt_template.format(x=task)

    assert agent.rollout("hi", RESOURCES, ROLLOUT) == "hi!"


def nothing() -> None: ...
def no_resource(task: Any) -> None: ...
def wrong_name(task: Any, model: Any) -> None: ...
def wrong_order(llm: Any, task: Any) -> None: ...
def one_too_many(task: Any, llm: Any, database: Any) -> None: ...
def prompt_only(task: Any, prompt_template: Any) -> None: ...
def llm_only(task: Any, llm: Any) -> None: ...


@pytest.mark.parametrize(
    ("decorate", "function"),
    [
        *[(lr.rollout, f) for f in (nothing, no_resource, wrong_name, wrong_order, one_too_many)],
        *[(lr.llm_rollout, f) for f in (nothing, wrong_name, prompt_only)],
        *[(lr.llm_rollout(strip_proxy=False), f) for f in (wrong_order,)],
        *[(lr.prompt_rollout, f) for f in (llm_only, no_resource)],
    ],
)
def test_parameters_that_no_one_can_fill_are_refused(decorate: Any, function: Any) -> None:
    with pytest.raises(lr.AgentError) as refused:
        decorate(function)
    assert repr(function.__name__) in str(refused.value) and "it needs 'task' first" in str(refused.value)


def test_a_resource_that_is_missing_is_named_with_what_there_is() -> None:
    agent = lr.rollout(prompt_only)
    with pytest.raises(lr.AgentError, match=r"'prompt_template' needs .*PromptTemplate; .*'a': 'LLM'"):
        agent.rollout(None, {"a": RESOURCES["second"]}, ROLLOUT)


async def test_a_class_plays_training_and_validation_by_its_own_methods() -> None:
    class Sync(lr.LitAgent[Any]):
        def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

        def validation_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 2.0

    class Async(lr.LitAgent[Any]):
        async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 3.0

        async def training_rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 4.0

    sync, asynchronous = Sync(), Async()
    assert not sync.is_async() and asynchronous.is_async()
    assert (sync.training_rollout(0, {}, ROLLOUT), sync.validation_rollout(0, {}, ROLLOUT)) == (1.0, 2.0)
    assert await asynchronous.training_rollout_async(0, {}, ROLLOUT) == 4.0
    assert await asynchronous.validation_rollout_async(0, {}, ROLLOUT) == 3.0


def test_a_class_is_async_as_soon_as_one_of_its_methods_is() -> None:
    class Validating(lr.LitAgent[Any]):
        async def validation_rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

    assert Validating().is_async() and not lr.LitAgent[Any]().is_async()


async def test_a_class_without_a_rollout_says_so() -> None:
    class Empty(lr.LitAgent[Any]): ...

    with pytest.raises(NotImplementedError, match="Empty defines neither"):
        Empty().training_rollout(0, {}, ROLLOUT)
    with pytest.raises(NotImplementedError, match="Empty defines neither"):
        await Empty().validation_rollout_async(0, {}, ROLLOUT)


def test_agents_travel_to_other_processes() -> None:
    def made(add: int) -> Any:
        @lr.rollout
        def agent(task: int, llm: lr.LLM) -> float:
            return task + add

        return agent

    again = cloudpickle.loads(cloudpickle.dumps(made(5)))
    assert again(1, None) == 6 and again.rollout(1, RESOURCES, ROLLOUT) == 6


def test_a_partial_is_an_agent() -> None:
    def play(task: int, llm: lr.LLM, factor: int) -> float:
        return task * factor

    assert lr.rollout(functools.partial(play, factor=3)).rollout(2, RESOURCES, ROLLOUT) == 6


def test_arguments_that_python_gathers_need_no_one(recwarn: pytest.WarningsRecorder) -> None:
    @lr.prompt_rollout()
    def agent(task: Any, prompt_template: Any, llm: Any, *args: Any, **kwargs: Any) -> Any:
        return prompt_template, llm.model

    assert agent.rollout(0, RESOURCES, ROLLOUT) == (PROMPT, "m")


@pytest.mark.parametrize("decorate", [lr.rollout, lr.llm_rollout, lr.prompt_rollout])
def test_refusals_are_the_errors_of_agent_lightning_too(decorate: Any) -> None:
    with pytest.raises(ValueError):
        decorate(nothing)
    with pytest.raises(NotImplementedError):
        decorate(wrong_name)


async def test_an_agent_is_played_as_what_it_is() -> None:
    @lr.rollout
    async def later(task: Any, llm: Any) -> float:
        return 1.0

    @lr.rollout
    def now(task: Any, llm: Any) -> float:
        return 1.0

    with pytest.raises(RuntimeError, match="agent 'later' is async: await its rollout_async"):
        later.rollout(0, RESOURCES, ROLLOUT)
    with pytest.raises(RuntimeError, match="agent 'now' is not async: call its rollout"):
        await now.rollout_async(0, RESOURCES, ROLLOUT)


async def test_an_object_that_is_called_as_a_coroutine_is_async() -> None:
    class Play:
        async def __call__(self, task: Any, llm: Any) -> float:
            return 2.0

    agent = lr.rollout(Play())
    assert agent.is_async() and agent.__name__ == "Play" and await agent.rollout_async(0, RESOURCES, ROLLOUT) == 2.0


def test_a_proxy_needs_an_attempt() -> None:
    agent = lr.llm_rollout(llm_only)
    queued = lr.Rollout(rollout_id="ro-2", input={}, start_time=0.0)
    with pytest.raises(lr.AgentError, match="rollout 'ro-2' has no attempt"):
        agent.rollout(0, RESOURCES, queued)
    lr.llm_rollout(strip_proxy=False)(llm_only).rollout(0, RESOURCES, queued)


def test_an_agent_knows_its_trainer_and_runner_while_they_live() -> None:
    class Owner:
        tracer: Any = None

    agent = lr.LitAgent[Any]()
    with pytest.raises(ValueError, match="the trainer of agent 'LitAgent' was asked for, and the agent's trainer has"):
        _ = agent.trainer
    runner: Any = Owner()
    trainer: Any = Owner()
    agent.set_runner(runner)
    agent.set_trainer(trainer)
    assert agent.runner is agent.get_runner() is runner and agent.trainer is trainer
    assert isinstance(agent.tracer, lr.OtelTracer)
    trainer.tracer = lr.DummyTracer()
    assert agent.tracer is agent.get_tracer() is trainer.tracer
    again = cloudpickle.loads(cloudpickle.dumps(agent))
    with pytest.raises(ValueError):
        _ = again.runner
    del runner
    with pytest.raises(ValueError, match="runner is gone"):
        _ = agent.runner


def test_trained_agents_are_said_elsewhere() -> None:
    with pytest.warns(DeprecationWarning, match="agent_match"):
        assert lr.LitAgent[Any](trained_agents="x").trained_agents == "x"

    class NoInit(lr.LitAgent[Any]):
        def __init__(self) -> None:
            pass

    agent: Any = NoInit()
    assert agent.trained_agents is None and agent.tracer is not None
    assert agent.on_rollout_start({}, None, None) is None and agent.on_rollout_end({}, None, None, None) is None


async def test_a_stop_iteration_out_of_an_agent_ends_it() -> None:
    def play(task: Any, llm: Any) -> float:
        return next(iter(()))

    agent = lr.rollout(play)
    waiting = asyncio.get_running_loop().run_in_executor(
        None, contained, agent, agent.training_rollout, 0, RESOURCES, ROLLOUT
    )
    with pytest.raises(lr.AgentError, match="agent 'play' let a StopIteration out"):
        await asyncio.wait_for(waiting, 5)
    assert contained(agent, lambda x: x, 3) == 3
