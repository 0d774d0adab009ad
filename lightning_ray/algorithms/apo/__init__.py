"""Automatic prompt optimisation: prompts are rolled out, criticised by a model that saw what came of them, and edited.

The loop and its settings are those of Agent Lightning 0.3's APO, after ProTeGi (Pryzant et al., 2023) and TextGrad
(Yuksekgonul et al., 2024); ``selection="pareto"`` is the search of GEPA (Agrawal et al., 2025).
"""

from lightning_ray.algorithms.apo.settings import APO

__all__ = ["APO"]
