"""Ports."""

from __future__ import annotations

import random
import socket
import threading

QUIET_RANGE = range(20_000, 25_000)
"""Below the ports that kernels hand out by themselves and those of Serve's replicas, and above those of Ray's workers,
so that a port that was free stays free until it is used."""
RANK_RANGE = range(25_000, 30_000)
"""The same for trainer ranks, who look at their node's address: what is to listen on 127.0.0.1 does not show there."""
TRIES = 100

_given: set[int] = set()
"""Ports that this process was given, which it may not have bound yet."""
_giving = threading.Lock()


def free_port(host: str, among: range = QUIET_RANGE) -> int:
    """A TCP port that is free on ``host`` now, and that this process was not given before while there are others.

    Raises OSError if a hundred tries find none.
    """
    with _giving:
        for left in ([port for port in among if port not in _given], among):
            for port in random.sample(left, min(TRIES, len(left))):
                if _is_free(host, port):
                    _given.add(port)
                    return port
            _given.difference_update(among)
    raise OSError(f"no free port on {host!r} among {min(TRIES, len(among))} of {among.start} to {among.stop - 1}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
