"""Agent Lightning 0.3's names for what is called otherwise here."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_ray.errors import ConfigError
from lightning_ray.stepper import LitAgentRunner
from lightning_ray.store.base import Store
from lightning_ray.store.client import LocalStoreClient
from lightning_ray.store.core import SpanStore
from lightning_ray.store.http.client import TOKEN_VARIABLE, HttpStoreClient

LightningStore = Store
Runner = LitAgentRunner


class InMemoryLightningStore(LocalStoreClient):
    """A store for this process and event loop, in a temporary folder that goes with it.

    Options of 0.3's are accepted and have no effect; from several threads use a ``StoreClient`` or ``HttpStoreClient``.
    """

    def __init__(self, *, thread_safe: bool = False, **unused: Any) -> None:
        if thread_safe:
            warnings.warn("thread_safe=True has no effect: use the store from one event loop", stacklevel=2)
        self._folder = TemporaryDirectory(prefix="lightning-ray-", ignore_cleanup_errors=True)
        super().__init__(SpanStore(Path(self._folder.name), fsync="none"))

    async def close(self) -> None:
        """Let go of it; what it held is gone."""
        await super().close()
        self._folder.cleanup()


class LightningStoreClient(HttpStoreClient):
    """A store behind ``deployments/store_api.py``; without ``token`` that of LIGHTNING_RAY_TOKEN_VARIABLE.

    0.3's options of retries and timeouts are accepted and have no effect. Raises ConfigError without a token.
    """

    def __init__(self, server_address: str, token: str | None = None, deadline: float = 120.0, **unused: Any) -> None:
        token = token or os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise ConfigError(f"the store at {server_address} wants a token: give token=..., or set {TOKEN_VARIABLE}")
        super().__init__(server_address, token, deadline)
