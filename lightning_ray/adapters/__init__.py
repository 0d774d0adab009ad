"""Spans into what an algorithm learns from: triplets of prompt, response and reward, or chat messages.

Names, arguments and meaning as in Agent Lightning 0.3. Training here reads the store's own columns, exact to the token;
adapters are for algorithms and agents written against 0.3, and for looking at a trace.
"""

from lightning_ray.adapters.base import Adapter, OtelTraceAdapter, TraceAdapter, TraceToTripletBase, Triplet
from lightning_ray.adapters.messages import OpenAIMessages, TraceToMessages
from lightning_ray.adapters.proxy import LlmProxyTraceToTriplet
from lightning_ray.adapters.reward_match import RewardMatchPolicy
from lightning_ray.adapters.tree import TraceTree
from lightning_ray.adapters.triplets import TracerTraceToTriplet

__all__ = [
    "Adapter",
    "LlmProxyTraceToTriplet",
    "OpenAIMessages",
    "OtelTraceAdapter",
    "RewardMatchPolicy",
    "TraceAdapter",
    "TraceToMessages",
    "TraceToTripletBase",
    "TraceTree",
    "TracerTraceToTriplet",
    "Triplet",
]
