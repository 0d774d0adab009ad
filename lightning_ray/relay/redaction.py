"""Takes secrets out of whatever an upstream says. Its length stays, so that what counts bytes stays true."""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 8
"""Shorter values (a version, a flag) are no secrets, and would be found in ordinary text."""


class Redaction:
    """Knows the secrets of one upstream."""

    def __init__(self, secrets: Iterable[str]):
        found = {secret for whole in secrets for secret in (whole, whole.partition(" ")[2]) if len(secret) >= SHORTEST}
        self._secrets = [secret.encode() for secret in sorted(found, key=len, reverse=True)]

    def clean(self, raw: bytes) -> bytes:
        """The same with each secret as stars."""
        for secret in self._secrets:
            if secret in raw:
                raw = raw.replace(secret, b"*" * len(secret))
        return raw

    def clean_text(self, text: str) -> str:
        """The same of text."""
        return self.clean(text.encode()).decode()
