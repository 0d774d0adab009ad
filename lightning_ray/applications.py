"""What a run has in Ray Serve: an application for each policy, and one for the relay."""

from __future__ import annotations

import asyncio
from typing import Any

from lightning_ray.config import EngineSettings
from lightning_ray.net import free_port
from lightning_ray.policy.transfer import Replicas
from lightning_ray.run.state import ONLY
from lightning_ray.serving import answers_of, deployed, serve_address, start_serve, within
from lightning_ray.threads import ask_ray

RELAY_SECONDS = 120.0


class Applications:
    """A run's applications in Serve, which is started with the first of them.

    ``run`` is a name that no other run has. ``alone``: nothing else is served there, so that routes need not say it.
    """

    def __init__(self, run: str, alone: bool):
        self.names: list[str] = []
        """In Serve; from when they are asked for."""
        self._run = run
        self._alone = alone
        self._policies: dict[str, tuple[Any, float]] = {}
        """The deployments' handles, and how many seconds their replicas may take to answer."""
        self._starting = asyncio.Lock()

    async def policy(self, name: str, application: Any, settings: EngineSettings) -> str:
        """Serve a policy; returns its address. Raises InfrastructureError if it does not come up in time."""
        served = self._run if name == ONLY else f"{self._run}-{name}"
        route = ("" if self._alone else f"/{self._run}") + ("" if name == ONLY else f"/policies/{name}")
        self.names.append(served)
        await self._start(settings)
        what = f"the deployment of {'the policy' if name == ONLY else name} at {serve_address()}{route}"
        seconds = settings.startup_timeout_seconds
        handle = await deployed(application, served, route or "/", seconds, what)
        self._policies[name] = handle, settings.swap_timeout_seconds
        return serve_address() + route

    async def relay(self, application: Any, host: str) -> str:
        """Serve the relay, beside the policies or alone on ``host``; returns its address."""
        served = f"{self._run}-relay"
        route = "/relay" if self._alone else f"/{served}"
        self.names.append(served)
        if not self._policies:
            await self._start(EngineSettings(host=host))
        await deployed(application, served, route, RELAY_SECONDS, "the relay deployment")
        return serve_address() + route

    async def _start(self, settings: EngineSettings) -> None:
        """Start Serve, with its HTTP where the first who asks wants it."""
        async with self._starting:
            port = settings.port or free_port(settings.host)
            starting = ask_ray(start_serve, settings.host, port)
            await within(starting, settings.startup_timeout_seconds, f"Ray Serve on port {port}")

    def serves(self, name: str) -> bool:
        """Whether a policy's deployment is up."""
        return name in self._policies

    def handle(self, name: str) -> Any:
        """Serve's handle of a policy's deployment."""
        return self._policies[name][0]

    def replicas_of(self, name: str) -> Replicas:
        """Calls a control method on every live replica of a policy."""

        async def call(method: str, *arguments: Any) -> list[Any]:
            handle, seconds = self._policies[name]
            what = "the policy's replicas" if name == ONLY else f"{name}'s replicas"
            return await answers_of(handle, method, arguments, seconds, what)

        return call
