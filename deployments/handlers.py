"""Serve's log handlers, kept over the import of a library that configures logging.

``logging.config`` closes all handlers that there are. Serve's then has no file any more: a replica's log ends, and a
controller that was started anew, which asks each replica for its log, gets an error and ends the replica.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

LOGGER = "ray.serve"


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Give Serve's handlers back what they write to, if they lost it within."""
    handlers = [handler for handler in logging.getLogger(LOGGER).handlers if isinstance(handler, MemoryHandler)]
    targets = [handler.target for handler in handlers]
    try:
        yield
    finally:
        for handler, target in zip(handlers, targets, strict=True):
            if handler.target is None:
                handler.setTarget(target)
