"""When a request is sent again, and after what pause."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Mapping

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
_PASSING = (408, 409, 429)


def may_pass(status: int, headers: Mapping[str, str]) -> bool:
    """Whether an answer is an error that another try may not meet; an upstream that says so itself knows best."""
    if status < 400:
        return False
    told = headers.get("x-should-retry")
    if told in ("true", "false"):
        return told == "true"
    return status in _PASSING or status >= 500


def pause(tried: int, headers: Mapping[str, str]) -> float:
    """Seconds until the next try: what the upstream asks for, otherwise twice as long each time; with jitter."""
    asked = asked_for(headers)
    if asked is not None:
        return asked + random.uniform(0, min(1.0, asked / 4))
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2**tried) * random.uniform(0.5, 1.0)


def asked_for(headers: Mapping[str, str]) -> float | None:
    """The pause of ``retry-after-ms`` or ``retry-after`` (seconds, or a date)."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    given = headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    date = email.utils.parsedate_tz(given)
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
