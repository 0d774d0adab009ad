"""Ports."""

from __future__ import annotations

import random
import socket

QUIET_RANGE = range(20_000, 30_000)
"""Below the ports that kernels hand out by themselves and those of Serve's replicas, and above those of Ray's workers,
so that a port that was free stays free until it is used."""


def free_port(host: str) -> int:
    """A TCP port that is free on ``host`` now. Raises OSError if a hundred tries find none."""
    for port in random.sample(QUIET_RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port on {host!r} among a hundred of {QUIET_RANGE.start} to {QUIET_RANGE.stop}")
