"""Which submitted Ray job this process is the entrypoint of."""

from __future__ import annotations

import json
import os

_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray's job supervisor hands to an entrypoint: its runtime environment and metadata."""


def this_job() -> str | None:
    """Its submission id; None outside of a submitted job."""
    try:
        metadata = json.loads(os.environ.get(_CONFIG) or "{}").get("metadata") or {}
    except ValueError:
        return None
    job: str | None = metadata.get("job_submission_id")
    return job
