"""LangGraph: a graph whose planner node comes before a reporter node with a tool."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Runs the graph to its last message."""
    from langchain_openai import ChatOpenAI
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    model = ChatOpenAI(model=llm.model, base_url=llm.endpoint, api_key=llm.api_key)
    with_tools = model.bind_tools([get_weather])

    async def planner(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    async def reporter(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await with_tools.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("planner", planner)
    graph.add_node("reporter", reporter)
    graph.add_node("tools", ToolNode([get_weather]))
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "reporter")
    graph.add_conditional_edges("reporter", tools_condition, {"tools": "tools", END: END})
    graph.add_edge("tools", "reporter")
    state = await graph.compile().ainvoke({"messages": [("user", question(task))]})
    return reward(task, state["messages"][-1].content)
