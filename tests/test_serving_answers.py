"""Asking all replicas of a deployment, while there are none, and while one does not answer."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ray import serving
from lightning_ray.errors import InfrastructureError
from lightning_ray.serving import answers_of


class Handle:
    """A handle whose broadcasts end as told, one after the other."""

    def __init__(self, *ends: Any):
        self.ends = list(ends)

    def broadcast(self, method: str, *arguments: Any) -> Handle:
        self.asked = (method, *arguments)
        return self

    def results(self, timeout_s: float) -> list[Any]:
        end = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        if isinstance(end, Exception):
            raise end
        return end


def unavailable() -> Exception:
    exceptions = pytest.importorskip("ray.serve.exceptions")
    common = pytest.importorskip("ray.serve._private.common")
    return exceptions.DeploymentUnavailableError(common.DeploymentID(name="policy", app_name="run"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ASK_AGAIN_SECONDS", 0.01)


async def test_while_nobody_is_there_it_is_asked_again() -> None:
    handle = Handle(unavailable(), [], unavailable(), ["one", "other"])
    assert await answers_of(handle, "describe", ["it"], 30.0, "the replicas") == ["one", "other"]
    assert handle.asked == ("describe", "it")


async def test_nobody_in_time_is_no_answer() -> None:
    assert await answers_of(Handle(unavailable()), "describe", [], 0.1, "the replicas") == []


async def test_a_replica_that_fails_or_is_late_is_told() -> None:
    with pytest.raises(InfrastructureError, match=r"the replicas did not all answer 'swap' within 5 s"):
        await answers_of(Handle(TimeoutError()), "swap", [], 5.0, "the replicas")
    with pytest.raises(ValueError, match="its own"):
        await answers_of(Handle(ValueError("its own")), "swap", [], 5.0, "the replicas")
