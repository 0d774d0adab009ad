"""What an agent says about itself: one call each, from inside its rollout, and the readers of what was said.

With ``propagate=False`` a span is made and given back, and recorded nowhere. Names and meaning as in Agent Lightning
0.3.
"""

from lightning_ray.emitter.annotations import emit_annotation
from lightning_ray.emitter.exceptions import emit_exception
from lightning_ray.emitter.messages import emit_message, get_message_value
from lightning_ray.emitter.objects import emit_object, get_object_value
from lightning_ray.emitter.operations import OperationContext, operation
from lightning_ray.emitter.rewards import (
    emit_reward,
    find_final_reward,
    find_reward_spans,
    get_reward_value,
    get_rewards_from_span,
    is_reward_span,
    reward,
)

__all__ = [
    "OperationContext",
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_reward",
    "find_final_reward",
    "find_reward_spans",
    "get_message_value",
    "get_object_value",
    "get_reward_value",
    "get_rewards_from_span",
    "is_reward_span",
    "operation",
    "reward",
]
