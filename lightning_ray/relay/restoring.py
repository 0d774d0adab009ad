"""What was spent before the relay's process began: the sum over the calls in the span store."""

from __future__ import annotations

import json
from collections import defaultdict

from lightning_ray.relay.spend import Spend, Usage
from lightning_ray.semconv import MODEL_CALL_NAMES
from lightning_ray.store.base import Store

_NAMES = ", ".join(f"'{name}'" for name in MODEL_CALL_NAMES.values())
_QUERY = f"""
SELECT attribute(more, 'upstream') AS upstream, status, attribute(more, 'cost') AS cost,
    attribute(more, 'usage') AS usage, attribute(more, 'upstream_retries') AS retries
FROM (SELECT more, status FROM spans WHERE prompt_ids IS NULL AND name IN ({_NAMES}))
"""


async def spent_before(store: Store) -> dict[str, Spend]:
    """By upstream. Calls that leave no span (embeddings) are not in it."""
    sums: defaultdict[str, Spend] = defaultdict(Spend)
    for row in (await store.sql(_QUERY)).to_pylist():
        if row["upstream"] is not None:
            usage = Usage.of(json.loads(row["usage"] or "{}"))
            sums[row["upstream"]].retries += int(row["retries"] or 0)
            sums[row["upstream"]].add(usage, float(row["cost"] or 0), row["status"] == "ERROR", row["status"] == "OK")
    return sums
