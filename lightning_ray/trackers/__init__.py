"""Where the figures of a run go: one file for each place, behind ``Trackers``."""

from lightning_ray.trackers.base import Row, Tracker
from lightning_ray.trackers.choice import Choice
from lightning_ray.trackers.group import Trackers

__all__ = ["Choice", "Row", "Tracker", "Trackers"]
