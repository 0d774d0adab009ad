"""Which endpoint an attempt's key opens: the policy, one of several policies, or one upstream of the relay.

Each resource has its own key.
"""

from __future__ import annotations

import re

POLICY = "policy"
_RELAYED = re.compile(r"/to/([^/]+)/v1/?$")
_SEVERAL = re.compile(r"/policies/([^/]+)/v1/?$")


def one_of_several(name: str) -> str:
    """The audience of the keys of a policy with a name."""
    return f"{POLICY}:{name}"


def relayed(name: str) -> str:
    """The audience of an upstream's keys."""
    return f"relay:{name}"


def audience_of(endpoint: str) -> str:
    """The audience of the keys for an endpoint's address."""
    if (found := _RELAYED.search(endpoint)) is not None:
        return relayed(found[1])
    found = _SEVERAL.search(endpoint)
    return POLICY if found is None else one_of_several(found[1])
