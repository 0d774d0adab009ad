"""Runs kept at a URL (``s3://bucket/runs``): worked on in a local place of their own, and mirrored there as they go."""

from lightning_ray.mirror.place import is_url, place_of, run_place, url_of

__all__ = ["is_url", "place_of", "run_place", "url_of"]
