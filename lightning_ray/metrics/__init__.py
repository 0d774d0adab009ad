"""What a run exports to Prometheus by way of Ray: the catalogue of metrics, and who sets them.

``catalogue`` names every one; ``exporter`` sets them; ``watch`` looks at the run every few seconds, ``replica`` at an
engine and the calls it answers, ``relay`` at upstreams. Those of a step come with its row (``trackers.ray_metrics``).
"""
