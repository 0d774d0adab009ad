"""Spans into triplets, with the agent that made each call and the reward that followed it.

A call may be seen twice, at its client and at its server; the two have one response id and make one triplet, with the
place and the agent of the client's span and the tokens of whichever has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ray.adapters.base import TraceToTripletBase, Triplet, our_spans
from lightning_ray.adapters.reward_match import RewardMatchPolicy, match_rewards
from lightning_ray.adapters.tree import TraceTree
from lightning_ray.otel import filter_and_unflatten_attributes
from lightning_ray.semconv import RESPONSE_ID
from lightning_ray.span import Span

ANY_AGENT = "*"
_PROMPT_IDS = ("prompt_token_ids", "agentlightning.operation.output.prompt_token_ids")
_RESPONSE_IDS = (
    "response_token_ids",
    "agentlightning.operation.output.response_token_ids.0",
    "agentlightning.operation.output.choices.0.token_ids",
    "agentlightning.operation.output.choices.0.provider_specific_fields.token_ids",
)
_INPUT, _OUTPUT = "agentlightning.operation.input", "agentlightning.operation.output"


class TracerTraceToTriplet(TraceToTripletBase):
    """One triplet for each model call, in the order of their starts.

    ``llm_call_match`` is searched in span names. With ``agent_match``, only calls within a span of an agent whose
    name it matches count: the innermost agent decides. Calls within reward spans are left out unless
    ``exclude_llm_call_in_reward`` is false.
    """

    def __init__(
        self,
        repair_hierarchy: bool = True,
        llm_call_match: str = r"openai\.chat\.completion",
        agent_match: str | None = None,
        exclude_llm_call_in_reward: bool = True,
        reward_match: RewardMatchPolicy = RewardMatchPolicy.FIRST_OCCURRENCE,
        _skip_empty_token_spans: bool = False,
    ):
        self.repair_hierarchy = repair_hierarchy
        self.llm_call_match = llm_call_match
        self.agent_match = agent_match
        self.exclude_llm_call_in_reward = exclude_llm_call_in_reward
        self.reward_match = RewardMatchPolicy(reward_match)
        self._skip_empty_token_spans = _skip_empty_token_spans

    def adapt(self, source: Sequence[Any], /) -> list[Triplet]:
        """The triplets of one rollout's spans; none of none."""
        if not source:
            return []
        tree = self._tree(source)
        calls = self._calls(tree)
        triplets = [(call, triplet_of(call)) for call in calls]
        if self._skip_empty_token_spans:
            triplets = [(c, t) for c, t in triplets if t.prompt["token_ids"] and t.response["token_ids"]]
        rewards = match_rewards(tree, {call.node.id for call, _ in triplets}, self.reward_match)
        return [triplet.model_copy(update={"reward": rewards.get(call.node.id)}) for call, triplet in triplets]

    def visualize(
        self, source: Sequence[Any], /, filename: str = "trace_tree", interested_span_match: str | None = None
    ) -> TraceTree:
        """Draw the tree to ``filename``.png (needs the package graphviz); returns it."""
        tree = self._tree(source)
        tree.visualize(filename, interested_span_match)
        return tree

    def _tree(self, source: Sequence[Any]) -> TraceTree:
        tree = TraceTree.from_spans(our_spans(source))
        if self.repair_hierarchy:
            tree.repair_hierarchy()
        return tree

    def _calls(self, tree: TraceTree) -> list[ModelCall]:
        """The calls that count, each once."""
        found: list[ModelCall] = []
        by_response: dict[str, ModelCall] = {}
        everyone = ANY_AGENT if self.agent_match is None else None
        waiting: list[tuple[TraceTree, str | None, bool, bool]] = [(tree, everyone, False, False)]
        while waiting:
            node, agent, in_reward, in_call = waiting.pop()
            named = node.agent_name()
            is_call = re.search(self.llm_call_match, node.span.name) is not None
            call = ModelCall(node, agent or "", response_id_of(node.span)) if is_call else None
            if call is not None and named is not None:  # the call's own span says who made it
                call.agent = named if self._wanted(named) else ""
            if call is not None and not (in_reward and self.exclude_llm_call_in_reward):
                twin = by_response.get(call.response_id or "")
                if twin is not None:
                    twin.join(call)
                elif not (call.response_id is None and in_call):
                    found.append(call)
                    if call.response_id is not None:
                        by_response[call.response_id] = call
            if named is not None:
                agent = named if self._wanted(named) else None
            inner = (agent, in_reward or node.is_reward_span(), in_call or is_call)
            waiting += [(child, *inner) for child in reversed(node.children)]
        return sorted((call for call in found if call.agent), key=lambda call: call.node.start_time or 0.0)

    def _wanted(self, agent: str) -> bool:
        return self.agent_match is None or re.search(self.agent_match, agent) is not None


@dataclass
class ModelCall:
    """A call in the tree; ``agent`` is empty if it is none that counts."""

    node: TraceTree
    agent: str
    response_id: str | None
    other: Span | None = None
    """The same call as another tracer saw it."""

    def join(self, twin: ModelCall) -> None:
        """Take over what the twin knows better: a named agent, and the attributes."""
        if self.agent in ("", ANY_AGENT) and twin.agent not in ("", ANY_AGENT):
            self.node, self.agent, self.other = twin.node, twin.agent, self.node.span
        else:
            self.other = twin.node.span


def response_id_of(span: Span) -> str | None:
    """The id of the answer."""
    for key in (RESPONSE_ID, "agentlightning.operation.output.id"):
        if isinstance(value := span.attributes.get(key), str):
            return value
    return None


def triplet_of(call: ModelCall) -> Triplet:
    """The call without its reward."""
    attributes = {**(call.other.attributes if call.other is not None else {}), **call.node.span.attributes}
    prompt = _nested(attributes, "gen_ai.prompt", f"{_INPUT}.messages")
    response: dict[str, Any] = {
        "token_ids": _ids(attributes, _RESPONSE_IDS),
        "raw_content": _nested(attributes, "gen_ai.completion", f"{_OUTPUT}.choices"),
    }
    if isinstance(logprobs := attributes.get("logprobs.content"), str):
        response["logprobs"] = json.loads(logprobs)
    return Triplet(
        prompt={
            "token_ids": _ids(attributes, _PROMPT_IDS),
            "raw_content": prompt,
            "image_urls": image_urls(prompt),
        },
        response=response,
        metadata={
            "request": _without(_nested(attributes, "gen_ai.request", _INPUT), "messages"),
            "response": _without(
                _nested(attributes, "gen_ai.response", _OUTPUT), "choices", "prompt_token_ids", "response_token_ids"
            ),
            "response_id": call.response_id,
            "agent_name": call.agent,
        },
    )


def _ids(attributes: dict[str, Any], keys: Iterable[str]) -> list[int]:
    for key in keys:
        value = attributes.get(key)
        if isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value):
            return list(value)
    return []


def _nested(attributes: dict[str, Any], *prefixes: str) -> Any:
    for prefix in prefixes:
        if found := filter_and_unflatten_attributes({k: v for k, v in attributes.items() if k != prefix}, prefix):
            return found
    return None


def _without(found: Any, *keys: str) -> Any:
    return {key: value for key, value in found.items() if key not in keys} if isinstance(found, dict) else found


def image_urls(messages: Any) -> list[str]:
    """The addresses of the images in some messages, in their order."""
    if isinstance(messages, dict):
        numbered = sorted((key for key in messages if key.isdigit()), key=int)
        messages = [messages[key] for key in numbered] if numbered else [messages]
    found: list[str] = []
    for message in messages or ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and content.startswith("["):
            try:
                content = json.loads(content)
            except ValueError:
                continue
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) and part.get("type") == "image_url" else None
            if isinstance(image, dict) and "url" in image:
                found.append(image["url"])
    return found
