"""CrewAI: a crew of a planner and a reporter, who has the tool; one task for each."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Kicks the crew off; the last task's output counts."""
    from crewai import LLM, Agent, Crew, Task
    from crewai.tools import tool

    model = LLM(model=f"openai/{llm.model}", base_url=llm.endpoint, api_key=llm.api_key)
    planner = Agent(role="planner", goal="Plan.", backstory="You plan.", llm=model)
    reporter = Agent(role="reporter", goal="Report.", backstory="You report.", llm=model, tools=[tool(get_weather)])
    tasks = [
        Task(description=question(task), expected_output="A plan.", agent=planner),
        Task(description=question(task), expected_output="A report.", agent=reporter),
    ]
    return reward(task, Crew(agents=[planner, reporter], tasks=tasks).kickoff())
