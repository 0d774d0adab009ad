"""Every metric as Prometheus gets it: scraped from a real Ray."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import httpx
import pytest

from lightning_ray.metrics.catalogue import METRICS
from lightning_ray.metrics.exporter import Exporter
from lightning_ray.own_ray import OwnRay

_SAMPLE = re.compile(r"^(ray_lightning_ray_\w+)\{([^}]*)\} (\S+)$", re.M)
_TAG = re.compile(r'(\w+)="([^"]*)"')


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Where a small Ray's metrics are."""
    import ray

    quick = {"metrics_report_interval_ms": 1000}
    own = OwnRay.start(lambda _: {}, {"num_cpus": 1, "log_to_driver": False, "_system_config": quick})
    [node] = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    own.end()


async def test_every_metric_comes_with_its_tags(endpoint: str) -> None:
    export = Exporter(**{tag: f"the {tag}" for tag in ("run", "policy", "replica", "upstream")})
    for metric in METRICS.values():
        tags = {tag: f"the {tag}" for tag in metric.tags[1:]}
        {"gauge": export.set, "counter": export.add, "histogram": export.observe}[metric.kind](metric.name, 3.0, **tags)
    wanted = {name: set(metric.tags) for metric in METRICS.values() for name in metric.series}
    found: dict[str, tuple[dict[str, str], float]] = {}
    async with asyncio.timeout(60), httpx.AsyncClient(timeout=5.0) as client:
        while not wanted.keys() <= found.keys():
            await asyncio.sleep(0.2)
            try:
                text = (await client.get(endpoint)).text
            except httpx.TransportError:
                continue
            found = {name: (dict(_TAG.findall(tags)), float(value)) for name, tags, value in _SAMPLE.findall(text)}
    for name, tags in wanted.items():
        told, value = found[name]
        assert {tag: told[tag] for tag in tags} == {tag: f"the {tag}" for tag in tags}, name
        if not name.endswith(("_bucket", "_sum", "_count")):
            assert value == 3.0, name
    assert found["ray_lightning_ray_call_seconds_count"][1] == 1.0
