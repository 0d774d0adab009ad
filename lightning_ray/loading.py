"""Loading without the garbage collector.

An import makes hundreds of thousands of objects that stay, and going through them again and again takes a fifth of the
time that an engine needs to start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, nothing is collected; what is there afterwards never is, so that later collections are short."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
