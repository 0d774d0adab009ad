"""cluster.yaml as it stands, and with its other provider in force."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROVIDERS = ("aws", "local")
CPUS = {"m6i.2xlarge": 8, "c6i.4xlarge": 16, "g6e.12xlarge": 48}
"""What AWS would be asked for."""


def block(text: str, provider: str) -> str:
    """What stands between a provider's marks."""
    found = re.search(rf"^# \[{provider}\]\n(.*?)^# \[{provider} end\]\n", text, re.MULTILINE | re.DOTALL)
    assert found, f"cluster.yaml has no block [{provider}]"
    return found[1]


def with_provider(provider: str) -> dict[str, Any]:
    """The file's values, with that provider in force."""
    text = (ROOT / "cluster.yaml").read_text()
    if provider == "local":
        local = block(text, "local")
        assert all(line.startswith("#") for line in local.splitlines()), "the other provider is commented out"
        text = text.replace(block(text, "aws"), "").replace(local, re.sub(r"^# ?", "", local, flags=re.MULTILINE))
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it asks a provider. Raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready: dict[str, Any] = prepare_config(config)
    for kind in ready["available_node_types"].values():
        if instance := kind["node_config"].get("InstanceType"):
            kind["resources"] = {"CPU": CPUS[instance], **kind.get("resources", {})}
    validate_config(ready)
    return ready
