"""Sets metrics of the catalogue by way of Ray, which takes them to Prometheus."""

from __future__ import annotations

import math
import threading
from typing import Any

from lightning_ray.metrics.catalogue import METRICS, PREFIX, Metric


class Exporter:
    """With the tags that all its metrics have in common, as far as they have them. Ray's metric is made with its first
    value; a value that is no finite number is none. Any thread may call.
    """

    def __init__(self, **common: str):
        self._common = common
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def set(self, name: str, value: Any, **tags: str) -> None:
        """A gauge has this value from now on."""
        if _is_finite(value):
            self._metric(name).set(float(value), self._tags(name, tags))

    def add(self, name: str, value: Any, **tags: str) -> None:
        """A counter has grown by so much; nothing if that is 0 or less."""
        if _is_finite(value) and value > 0:
            self._metric(name).inc(float(value), self._tags(name, tags))

    def observe(self, name: str, value: Any, **tags: str) -> None:
        """One more value of a histogram."""
        if _is_finite(value):
            self._metric(name).observe(float(value), self._tags(name, tags))

    def _tags(self, name: str, own: dict[str, str]) -> dict[str, str]:
        given = {**self._common, **own}
        return {tag: given[tag] for tag in METRICS[name].tags}

    def _metric(self, name: str) -> Any:
        with self._lock:
            if name not in self._made:
                self._made[name] = _make(METRICS[name])
            return self._made[name]


def _make(metric: Metric) -> Any:
    from ray.util import metrics

    name = f"{PREFIX}{metric.name}"
    if metric.kind == "histogram":
        return metrics.Histogram(name, metric.description, list(metric.buckets), metric.tags)
    kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
    return kind(name, metric.description, metric.tags)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
