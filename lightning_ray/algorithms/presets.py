"""The family of GRPO: what each paper sets, by name. A preset gives defaults; settings given beside it win.

A rollout stands for what the papers call a response or output: it counts once, in however many rows it came. Where a
paper averages over responses, that is ``rollout-mean``; where it does not say, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

PresetName = Literal["grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "gpg", "sapo"]

GRPO = {
    "advantage": "grpo",
    "advantage_by_std": True,
    "loss": "vanilla",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "loss_aggregation": "rollout-mean",
    "reference": {"coefficient": 0.04, "estimator": "k3", "place": "loss"},
}
"""Shao et al., 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"
(arXiv:2402.03300), equation 3 and section 4.2: advantages (r - mean) / std over the group, PPO's clipped ratio, the
mean over an output's tokens and then over outputs, and 0.04 times a k3 estimate of the divergence from the initial
model."""

DR_GRPO = {
    "advantage": "grpo",
    "advantage_by_std": False,
    "loss": "vanilla",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "loss_aggregation": "rollout-sum-norm",
    "loss_horizon": 1024,
}
"""Liu et al., 2025, "Understanding R1-Zero-Like Training: A Critical Perspective" (arXiv:2503.20783): without the two
biases of GRPO. Advantages r - mean, and a sum over a response's tokens divided by a constant (there the largest
length that is generated; ``loss_horizon`` is to be set to it)."""

DAPO = {
    "advantage": "grpo",
    "advantage_by_std": True,
    "loss": "vanilla",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "loss_aggregation": "token-mean",
    "batch": {
        "groups": {"no_variance": "resample"},
        "overlong": {"max_tokens": 20480, "cache_tokens": 4096},
    },
}
"""Yu et al., 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" (arXiv:2503.14476): a higher upper
clip (3.1), groups without variance sampled again (3.2), the mean over all tokens (3.3), and a soft punishment of
responses that near the longest (3.4, with the lengths of section 4.1). No divergence from a reference."""

GSPO = {
    "advantage": "grpo",
    "advantage_by_std": True,
    "loss": "gspo",
    "clip_low": 3e-4,
    "clip_high": 4e-4,
    "loss_aggregation": "rollout-mean",
}
"""Zheng et al., 2025, "Group Sequence Policy Optimization" (arXiv:2507.18071), section 5.1 for the bounds: the ratio is
of a whole sequence, to the power of 1 / length, and clipped as such. A sequence is a row."""

CISPO = {
    "advantage": "grpo",
    "advantage_by_std": True,
    "loss": "cispo",
    "clip_low": 1.0,
    "clip_high": 4.0,
    "loss_aggregation": "token-mean",
}
"""MiniMax, 2025, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention" (arXiv:2506.13585): every
token's log probability is trained, weighted by its ratio, which is capped and has no gradient; no lower bound. The
paper tunes the upper bound and does not tell it: ratios up to 5 are this library's choice."""

RLOO = {
    "advantage": "rloo",
    "loss": "gpg",
    "loss_aggregation": "rollout-sum",
}
"""Ahmadian et al., 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs" (arXiv:2402.14740): the reward less the mean of the group's other rollouts, times the log probability of the
whole rollout."""

REINFORCE_PLUS_PLUS = {
    "advantage": "reinforce_plus_plus",
    "loss": "vanilla",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "loss_aggregation": "rollout-mean",
    "reference": {"coefficient": 0.01, "estimator": "k1", "place": "reward"},
}
"""Hu et al., 2025, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization"
(arXiv:2501.03262): the reward less the divergence from the reference summed from a token on, normalised over all
tokens of the batch, no groups; PPO's clip. The coefficient is this library's choice."""

GPG = {
    "advantage": "grpo",
    "advantage_by_std": False,
    "loss": "gpg",
    "loss_aggregation": "token-mean",
}
"""Chu et al., 2025, "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning" (arXiv:2504.02546),
with F_norm = 1: log probability times r - mean, no clip, no reference. Its factor, which makes up for the groups
without variance, is the mean over the rollouts that are left when those are dropped."""

SAPO = {
    "advantage": "grpo",
    "advantage_by_std": True,
    "loss": "sapo",
    "tau_positive": 1.0,
    "tau_negative": 1.05,
    "loss_aggregation": "rollout-mean",
}
"""Gao et al., 2025, "Soft Adaptive Policy Optimization" (arXiv:2511.20347): in place of a clip, a sigmoid of the ratio
around 1, steeper where the advantage is negative."""

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "dr-grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "rloo": RLOO,
    "reinforce++": REINFORCE_PLUS_PLUS,
    "gpg": GPG,
    "sapo": SAPO,
}


def with_preset(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings over their preset's defaults, those of parts one by one, as far as they are in ``fields``.

    An aggregation that is given does away with the preset's ``loss_horizon``.
    """
    preset = PRESETS.get(str(given.get("preset")), {})
    defaults = {name: value for name, value in preset.items() if name in fields}
    if "loss_aggregation" in given and not str(given["loss_aggregation"]).endswith("-norm"):
        defaults.pop("loss_horizon", None)
    return over(defaults, given)


def over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values over others, part by part."""
    result = {**defaults, **given}
    for name in defaults.keys() & given.keys():
        value, default = given[name], defaults[name]
        if isinstance(value, BaseModel):
            result[name] = type(value)(**over(default, value.model_dump(exclude_unset=True)))
        elif isinstance(default, Mapping) and isinstance(value, Mapping):
            result[name] = over(default, value)
    return result


def take_out(values: dict[str, Any], names: Mapping[str, Any]) -> None:
    """Remove what ``names`` has, part by part."""
    for name, inner in names.items():
        if isinstance(inner, Mapping) and isinstance(values.get(name), dict):
            take_out(values[name], inner)
        else:
            values.pop(name, None)
