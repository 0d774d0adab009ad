"""The ASGI app: Agent Lightning 0.3's REST paths over a Store, ours in the same style, and OTLP.

    /v1/agl/...   REST; JSON, or msgpack and Arrow for those that ask for it
    /v1/traces    OTLP/HTTP

Invariant: a caller without the token learns nothing but that the API is alive, and every failure is answered with
a reason in plain words, ``{"detail": ...}``, never with a traceback. What the store does is the Store's business.

    400  the body or a parameter is unreadable      409  the store refused it as it now stands
    401  no token, or another one                   413  larger than the limit
    404  a rollout, attempt or resources that the   422  a field is missing or wrong, by its name
         store does not know (looked up after the   503  the store is out of reach; come again
         refusal, not read from its words)
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store.base import Store
from lightning_ray.store.http.bodies import MAX_BODY_BYTES, Refusal, answer, refusal_answer
from lightning_ray.store.http.call import Call
from lightning_ray.store.http.handlers import PATHS, Path
from lightning_ray.store.http.otlp import export_traces

PREFIX = "/v1/agl"
RETRY_AFTER_SECONDS = 1
_log = logging.getLogger(__name__)


class StoreApi:
    """The app. ``token`` opens everything but ``/v1/agl/health``; bodies of more than ``max_body_bytes`` are
    refused.
    """

    def __init__(self, store: Store, token: str, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        if not token:
            raise StoreError("the store's HTTP API needs a token; it is not served without")
        self.store = store
        self.max_body_bytes = max_body_bytes
        self._bearer = f"Bearer {token}".encode()
        self._app: ASGIApp = Starlette(
            routes=[*self._routes(), Route("/v1/traces", self._traces, methods=["POST"]), *_unsupported()],
            exception_handlers={HTTPException: _no_route},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Ids are taken from the path as it was sent, so that one with a slash stays one part.
            scope = {**scope, "path": scope.get("raw_path", b"").decode("latin-1") or scope["path"]}
            refusal = self._unauthorized(scope)
            if refusal is not None:
                await refusal_answer(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _unauthorized(self, scope: Scope) -> Refusal | None:
        if scope["path"].removeprefix(scope.get("root_path", "")) == f"{PREFIX}/health":
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._bearer):
            return None
        reason = "the bearer token is wrong" if given else "no token; send the header 'Authorization: Bearer <token>'"
        return Refusal(401, reason, {"WWW-Authenticate": "Bearer"})

    def _routes(self) -> list[Route]:
        return [Route(f"{PREFIX}/{path.path}", self._endpoint(path), methods=[path.method]) for path in PATHS]

    def _endpoint(self, path: Path) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            call = Call(self.store, request, self.max_body_bytes)
            try:
                return answer(request, await path.handler(call), path.status)
            except Refusal as refusal:
                return refusal_answer(refusal)
            except Exception as error:
                return refusal_answer(await _explained(call, error, path.refused))

        return endpoint

    async def _traces(self, request: Request) -> Response:
        return await export_traces(self.store, request, self.max_body_bytes)


async def _explained(call: Call, error: Exception, refused: int) -> Refusal:
    """What an exception says to the caller."""
    try:
        if isinstance(error, StoreError):
            return Refusal(refused if await call.knows_all() else 404, str(error))
    except Exception as second:
        error = second
    return _failure(error)


def _failure(error: Exception) -> Refusal:
    """The answer to a failure that is not the caller's."""
    if isinstance(error, InfrastructureError):
        return Refusal(503, str(error), {"Retry-After": str(RETRY_AFTER_SECONDS)})
    _log.error("a request failed", exc_info=error)
    return Refusal(500, "the store's HTTP API failed; its log says why")


def _unsupported() -> list[Route]:
    async def refuse(request: Request) -> Response:
        return refusal_answer(Refusal(501, f"{request.url.path} is not served; only traces are"))

    return [Route(f"/v1/{signal}", refuse, methods=["POST"]) for signal in ("metrics", "logs", "development/profiles")]


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    return refusal_answer(Refusal(error.status_code, f"{asked}: {error.detail.lower()}", error.headers))
