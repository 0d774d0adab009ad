"""Overlong reward shaping: a response that nears the limit loses reward, the more the longer it is."""

from __future__ import annotations

from lightning_ray.trajectories.settings import OverlongPenalty


def overlong_penalty(tokens: int, settings: OverlongPenalty) -> float:
    """What is added to the reward of a response of so many tokens, from 0 down to ``-settings.penalty``.

    The soft punishment of DAPO (Yu et al., 2025, arXiv:2503.14476, equation 13), with L_max = ``max_tokens`` and
    L_cache = ``cache_tokens``, times ``penalty``::

        0                                  if |y| <= L_max - L_cache
        ((L_max - L_cache) - |y|) / L_cache  if L_max - L_cache < |y| <= L_max
        -1                                 if L_max < |y|
    """
    over = tokens - (settings.max_tokens - settings.cache_tokens)
    return -settings.penalty * min(max(over / settings.cache_tokens, 0.0), 1.0)
