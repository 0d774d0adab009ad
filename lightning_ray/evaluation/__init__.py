"""Evaluation: an agent played on tasks with some model, and figures that say how sure they are.

    subject (a run, a folder, an endpoint) --session--> plays --figures--> estimates --> report, comparison

``figures`` is what a run shows before, during and after its training too.
"""

from lightning_ray.evaluation.figures import Evaluation, evaluate, mean

__all__ = ["Evaluation", "evaluate", "mean"]
