"""Whether agents on other nodes reach the policy or the relay, which listen at the driver's node."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from lightning_ray.errors import ConfigError
from lightning_ray.placement.asks import Ask
from lightning_ray.placement.view import Node


def check_heard(setting: str, hosts: Iterable[str], asks: Sequence[Ask], nodes: Sequence[Node], here: str) -> None:
    """Raises ConfigError if one of the ``hosts`` is loopback and runners may go to nodes with another address.

    ``setting`` is what says the hosts; ``here`` is this node's id. Simulated nodes of one machine have one address.
    """
    deaf = next((host for host in hosts if is_loopback(host)), None)
    own = next((node.address for node in nodes if node.node_id == here), None)
    runners = [ask for ask in asks if ask.role == "runner"]
    elsewhere = [node.address for node in nodes if node.address != own and node.may_hold(runners)]
    if deaf is not None and own is not None and elsewhere:
        raise ConfigError(
            f"{setting}={deaf!r} is heard on this node ({own}) alone, and runners may go to {', '.join(elsewhere)}: "
            f"set {setting}='0.0.0.0' where the nodes' network is private, or keep runners here by "
            "placement.runner.label"
        )


def is_loopback(host: str) -> bool:
    """Whether a host is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
