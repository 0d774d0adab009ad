"""What an update tells of itself."""

from __future__ import annotations

from collections.abc import Sequence

PER_TOKEN = {
    "nll": "nll",
    "clip_share": "clipped",
    "approx_kl": "kl",
    "entropy": "entropy",
    "reference_kl": "reference_kl",
    "ratio_mean": "ratio",
    "capped_share": "capped",
    "rejected_share": "rejected",
}


def update_figures(steps: Sequence[dict[str, float]], tokens: Sequence[int]) -> dict[str, float]:
    """Figures of an update, from those of its optimizer steps and their trained tokens.

    ``loss`` and ``grad_norm`` (before clipping) are means over the steps; over the trained tokens is ``entropy``, of a
    likelihood objective ``nll``, otherwise ``clip_share``, ``approx_kl`` (engine against trainer), with a reference
    ``reference_kl`` (all in nats), and of the importance weights, trainer over engine as ``correction`` has them,
    ``ratio_mean``, ``capped_share`` (that are beyond its ``cap`` or ``floor``, or would be without a correction) and
    ``rejected_share``, beside ``ratio_max``. ``learning_rate`` is that of the last step. Further ``steps``.

    ``max_logprob_diff`` and ``mean_logprob_diff`` between trainer and engine before the first step, over all trained
    tokens, are added where they are checked.
    """
    result = {name: sum(step[name] for step in steps) / len(steps) for name in ("loss", "grad_norm")}
    total = sum(tokens)
    result |= {name: sum(step[what] for step in steps) / total for name, what in PER_TOKEN.items() if what in steps[0]}
    if "ratio_max" in steps[0]:
        result["ratio_max"] = max(step["ratio_max"] for step in steps)
    return result | {"learning_rate": steps[-1]["learning_rate"], "steps": float(len(steps))}
