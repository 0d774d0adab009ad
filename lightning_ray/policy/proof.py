"""The proof of a swap: canary prompts whose logprobs the engine must reproduce.

The engine's own checksums see what arrived, not what its kernels compute with; the canary sees just that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

CANARY = "canary-"
"""How the ids of canaries' requests begin."""
CANARY_LENGTH = 10
"""Every parameter but the embeddings takes part in every token; more of them cost time at each swap."""
CANARIES = 2
PROBE_TOLERANCE = 1e-4
"""Relative difference of two probes from which a parameter counts as different (float32 sums in another order)."""
COARSE_PROBE_TOLERANCE = 3e-2
"""The same where the engine computes them in bfloat16."""


def canary_prompts(vocabulary: int, length: int = CANARY_LENGTH, count: int = CANARIES) -> list[list[int]]:
    """Fixed pseudo-random prompts over the whole vocabulary: ``count`` lists of ``length`` token ids."""
    draw = np.random.default_rng(20260101)
    return [[int(t) for t in draw.integers(0, vocabulary, size=length)] for _ in range(count)]


@dataclass(frozen=True)
class Proof:
    """What one replica showed for one version."""

    replica_id: str
    version: int
    max_logprob_diff: float
    tolerance: float
    unlike: Mapping[str, int] = field(default_factory=dict)
    """Kinds of parameters that the replica holds with other bits -> how many, where bits are compared."""

    @property
    def holds(self) -> bool:
        """Whether the replica computes with the trainer's weights (false for NaN too)."""
        return self.max_logprob_diff <= self.tolerance and not self.unlike

    @property
    def off(self) -> str:
        """How far it is from holding, in words."""
        bits = f", other bits in {sum(self.unlike.values())} parameters" if self.unlike else ""
        return f"off by {self.max_logprob_diff:.1e}{bits}"


def max_difference(expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> float:
    """Largest absolute difference of two sets of logprobs; infinite when their shapes differ or one is NaN."""
    if [len(row) for row in expected] != [len(row) for row in found]:
        return float("inf")
    a, b = (np.array([value for row in rows for value in row], np.float64) for rows in (expected, found))
    with np.errstate(invalid="ignore"):
        worst = float(np.max(np.abs(a - b), initial=0.0)) if len(a) else float("inf")
    return worst if np.isfinite(worst) else float("inf")


def failure_message(proof: Proof, kinds: dict[str, int]) -> str:
    """What a user is told when a proof fails."""
    held = proof.max_logprob_diff <= proof.tolerance
    kinds = dict(proof.unlike) or kinds
    if kinds:
        listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        detail = f"Parameter kinds that differ from the trainer's: {listed}."
    else:
        detail = "No single parameter differs: the engine computes the same weights otherwise (dtype, kernels, config)."
    if held:
        shown, fix = "it holds weights with other bits than the trainer's, though its logprobs are as near", ""
    else:
        shown = (
            f"its canary logprobs differ from the trainer's by {proof.max_logprob_diff:.2e} (tolerance "
            f"{proof.tolerance:.0e})"
        )
        fix = ", or raise engine.logprob_tolerance if the engine's own numbers are coarser than engine.dtype says"
    return (
        f"Weight swap to version {proof.version} is not proved on replica {proof.replica_id}: {shown}. {detail} "
        f"Nothing sampled under this version was used. Resume from the last checkpoint{fix}."
    )


def differing_kinds(
    trainer: Mapping[str, Sequence[float]], engine: Mapping[str, Sequence[float]], tolerance: float = PROBE_TOLERANCE
) -> dict[str, int]:
    """Parameter kinds (names without layer numbers) whose probes differ or are missing -> how many parameters."""
    kinds: dict[str, int] = {}
    tied = "lm_head.weight" not in trainer
    for name, probe in engine.items():
        expected = trainer.get("model.embed_tokens.weight" if tied and name == "lm_head.weight" else name)
        if expected is None and name.endswith(".bias") and not any(probe):
            continue  # engines have zeros where a checkpoint has none
        # Written so that a NaN differs.
        if expected is None or not math.dist(probe, expected) <= tolerance * math.hypot(*expected):
            kind = _kind(name)
            if tied and name == "lm_head.weight":
                kind += " (tied to model.embed_tokens.weight)"
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def unlike(expected: Mapping[str, int], held: Sequence[tuple[Sequence[str], int]]) -> tuple[dict[str, int], int]:
    """Parameter kinds of which an engine's bit sums (``bits.engine_bit_sums``) are not the trainer's -> how many
    parameters; and how many parameters could be compared.
    """
    kinds: dict[str, int] = {}
    compared = 0
    for names, found in held:
        if all(name in expected for name in names):
            compared += len(names)
            if (sum(expected[name] for name in names) - found) % 2**64:  # sums of 64 bits, which overflow
                for kind in map(_kind, names):
                    kinds[kind] = kinds.get(kind, 0) + 1
    return kinds, compared


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
