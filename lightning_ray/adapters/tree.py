"""The spans of a trace as a tree, and the repair of a tree that several tracers grew.

A child whose parent is not among the spans hangs under a virtual one; several roots hang under a virtual root. Spans
without times keep their place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_ray.agent_names import agent_name
from lightning_ray.emitter.rewards import get_reward_value
from lightning_ray.semconv import AGL_OPERATION, AGL_REWARD, LightningSpanAttributes
from lightning_ray.span import Span


class TraceTree:
    """A span and what happened in it, in the order of the spans given."""

    def __init__(self, id: str, span: Span, children: list[TraceTree] | None = None):
        self.id = id
        self.span = span
        self.children = children if children is not None else []

    @classmethod
    def from_spans(cls, spans: Sequence[Span]) -> TraceTree:
        """The tree of some spans; of several with one id the first counts. Raises ValueError without any."""
        if not spans:
            raise ValueError("there are no spans to make a tree of")
        nodes: dict[str, TraceTree] = {}
        for span in spans:
            nodes.setdefault(span.span_id, cls(span.span_id, span))
        children: dict[str | None, list[TraceTree]] = defaultdict(list)
        for node in nodes.values():
            children[node.span.parent_id].append(node)
        for node in nodes.values():
            node.children = children.pop(node.id, [])
        roots = children.pop(None, []) + [cls._virtual(lost or "", found) for lost, found in children.items()]
        reached = {node.id for root in roots for node in root.traverse()}
        for node in nodes.values():  # of a circle of parents, one is taken for the root
            if node.id not in reached:
                for other in nodes.values():
                    other.children = [child for child in other.children if child is not node]
                roots.append(node)
                reached |= {inner.id for inner in node.traverse()}
        return roots[0] if len(roots) == 1 else cls._virtual("virtual-root", roots, "virtual-root")

    @classmethod
    def _virtual(cls, span_id: str, children: list[TraceTree], name: str | None = None) -> TraceTree:
        first = children[0].span
        starts = [child.start_time for child in children if child.start_time is not None]
        ends = [child.end_time for child in children if child.end_time is not None]
        span = Span.from_attributes(
            attributes={},
            rollout_id=first.rollout_id,
            attempt_id=first.attempt_id,
            sequence_id=first.sequence_id,
            trace_id=first.trace_id,
            span_id=span_id,
            name=name,
            start_time=min(starts, default=None),
            end_time=max(ends, default=None),
        )
        return cls(span_id, span, children)

    @property
    def start_time(self) -> float | None:
        """Of its span."""
        return self.span.start_time

    @property
    def end_time(self) -> float | None:
        """Of its span."""
        return self.span.end_time

    def traverse(self) -> list[TraceTree]:
        """Every node, each before its children."""
        return list(self._walk())

    def _walk(self) -> Iterator[TraceTree]:
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)

    def find_id(self, id: str) -> TraceTree | None:
        """The node of that id."""
        return next((node for node in self._walk() if node.id == id), None)

    def add_child(self, child: TraceTree) -> None:
        """Append a child."""
        self.children.append(child)

    def names_tuple(self) -> tuple[str, list[Any]]:
        """The tree of names, with ``[agent]`` behind those of agents."""
        agent = self.agent_name()
        name = self.span.name if agent is None else f"{self.span.name} [{agent}]"
        return name, [child.names_tuple() for child in self.children]

    def to_json(self) -> dict[str, Any]:
        """The tree in JSON's terms."""
        return {
            "id": self.id,
            "span": self.span.model_dump(mode="json"),
            "children": [child.to_json() for child in self.children],
        }

    def agent_name(self) -> str | None:
        """The agent that the span is of."""
        return agent_name(self.span.name, self.span.attributes)

    def is_reward_span(self) -> bool:
        """Whether the span has a reward, or is a function that computes one."""
        named = self.span.attributes.get(LightningSpanAttributes.OPERATION_NAME.value)
        return get_reward_value(self.span) is not None or (self.span.name == AGL_OPERATION and named == AGL_REWARD)

    def repair_hierarchy(self) -> None:
        """Move what lies directly under the root into the tightest other span that encloses it in time.

        Frameworks and clients may be traced by systems that do not know each other, so that a model call floats
        beside the agent that made it. A span that lasts exactly as long as another is not moved into it.
        """
        if len(self.children) == 1:
            self.children[0].repair_hierarchy()
            return
        for node in list(self.children):
            if len(self.children) == 1:
                return
            inside = {id(one) for one in node._walk()}
            around = [one for one in self._walk() if one is not self and id(one) not in inside and _encloses(one, node)]
            if around:
                self.children.remove(node)
                min(around, key=_duration).children.append(node)

    def visualize(self, filename: str, interested_span_match: str | None = None) -> None:
        """Draw the tree to ``filename``.png (needs the package graphviz); only what matches, and what leads there."""
        import graphviz

        drawing = graphviz.Digraph(comment="Trace Tree")

        def draw(node: TraceTree) -> bool:
            inner = [child for child in node.children if draw(child)]
            if not inner and interested_span_match is not None and not re.search(interested_span_match, node.span.name):
                return False
            agent = node.agent_name()
            drawing.node(node.id, f"{node.id[-8:]} ({node.span.name})" + (f" [{agent}]" if agent else ""))
            for child in inner:
                drawing.edge(node.id, child.id)
            return True

        draw(self)
        drawing.render(filename, format="png", cleanup=True)

    def __repr__(self) -> str:
        return f"TraceTree({self.id!r}, {self.span.name!r}, {len(self.children)} children)"


def _encloses(outer: TraceTree, inner: TraceTree) -> bool:
    if None in (outer.start_time, outer.end_time, inner.start_time, inner.end_time):
        return False
    times = (outer.start_time, outer.end_time), (inner.start_time, inner.end_time)
    return times[0] != times[1] and outer.start_time <= inner.start_time and outer.end_time >= inner.end_time  # type: ignore[operator]


def _duration(node: TraceTree) -> float:
    return (node.end_time or 0.0) - (node.start_time or 0.0)
