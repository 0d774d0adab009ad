"""Which endpoint an attempt's key opens: the policy, or one upstream of the relay; each resource has its own key."""

from __future__ import annotations

import re

POLICY = "policy"
_RELAYED = re.compile(r"/to/([^/]+)/v1/?$")


def relayed(name: str) -> str:
    """The audience of an upstream's keys."""
    return f"relay:{name}"


def audience_of(endpoint: str) -> str:
    """The audience of the keys for an endpoint's address."""
    found = _RELAYED.search(endpoint)
    return POLICY if found is None else relayed(found[1])
