"""An upstream as hosted ones are, over real HTTP: OpenAI's and Anthropic's shapes, streams, limits and accidents."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "sk-upstream-0123456789abcdef"
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
WORDS = ["Hel", "lo ", "wörld"]


def text_of(body: dict[str, Any]) -> str:
    """What is answered: the last message, so that answers can be told apart."""
    return f"echo {body['messages'][-1]['content']}"


def data(value: Any, event: str | None = None) -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class FakeUpstream:
    """Keeps what it was sent; ``plan`` holds what goes wrong next, ``pace`` is the time between two parts."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.plan: list[Any] = []
        self.sent: list[bytes] = []
        """Parts of streams, in order, each noted when it was handed to the server."""
        self.pace = 0.0
        self.delay = 0.0
        self.cancelled = 0
        self.running = 0
        self.most_running = 0
        self.address = ""

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models),
        ]
        return Starlette(routes=routes)

    async def begin(self, request: Request) -> tuple[dict[str, Any], Response | None]:
        raw = await request.body()
        body = json.loads(raw) if raw else {}
        self.requests.append((str(request.url), dict(request.headers), body))
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key")
        if given != KEY:
            return body, JSONResponse({"error": {"message": f"Incorrect API key provided: {given}"}}, 401)
        accident = self.plan.pop(0) if self.plan else None
        if isinstance(accident, Response):
            return body, accident
        if accident == "drop":
            raise Dropped
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.running -= 1
        return body, None

    async def stream(self, parts: list[bytes], drop_after: int | None = None) -> AsyncIterator[bytes]:
        try:
            for index, part in enumerate(parts):
                if index == drop_after:
                    raise Dropped
                self.sent.append(part)
                yield part
                await asyncio.sleep(self.pace)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def chat(self, request: Request) -> Response:
        body, refusal = await self.begin(request)
        if refusal is not None:
            return refusal
        base = {"id": f"chatcmpl-{len(self.requests)}", "model": "big-model-2026", "created": 1}
        if not body.get("stream"):
            message = {"role": "assistant", "content": text_of(body)}
            if body.get("leak"):
                message["content"] = f"my headers: {dict(request.headers)}"
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            extra: dict[str, Any] = {}
            if body.get("return_token_ids"):
                choice["token_ids"] = [7, 8]
                extra["prompt_token_ids"] = [1, 2, 3]
            return JSONResponse(
                {**base, "object": "chat.completion", "choices": [choice], "usage": USAGE, **extra},
                headers={"x-ratelimit-remaining-requests": "9", "set-cookie": "a=b", "x-debug": KEY},
            )
        base["object"] = "chat.completion.chunk"
        words = [f"[{KEY}]"] if body.get("leak") else [*WORDS, f"({text_of(body)})"]
        parts = [
            data({**base, "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            for word in words
        ]
        parts.append(data({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        if (body.get("stream_options") or {}).get("include_usage"):
            parts.append(data({**base, "choices": [], "usage": USAGE}))
        parts.append(b"data: [DONE]\n\n")
        if cut := body.get("cut_into"):
            whole = b"".join(parts)
            parts = [whole[at : at + cut] for at in range(0, len(whole), cut)]
        return StreamingResponse(self.stream(parts, body.get("drop_after")), media_type="text/event-stream")

    async def messages(self, request: Request) -> Response:
        body, refusal = await self.begin(request)
        if refusal is not None:
            return refusal
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "other-model",
            "content": [{"type": "text", "text": text_of(body)}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 40, "cache_read_input_tokens": 60, "output_tokens": 20},
        }
        if not body.get("stream"):
            return JSONResponse(message)
        begun = {**message, "content": [], "stop_reason": None}
        begun["usage"] = {"input_tokens": 40, "cache_read_input_tokens": 60, "output_tokens": 1}
        events: list[tuple[str, dict[str, Any]]] = [
            ("message_start", {"message": begun}),
            ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
            ("ping", {}),
            *(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": w}}) for w in WORDS),
            ("content_block_stop", {"index": 0}),
            ("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}}),
            ("message_stop", {}),
        ]
        parts = [data({"type": name, **value}, name) for name, value in events]
        return StreamingResponse(self.stream(parts, body.get("drop_after")), media_type="text/event-stream")

    async def responses(self, request: Request) -> Response:
        body, refusal = await self.begin(request)
        if refusal is not None:
            return refusal
        said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]}
        usage = {"input_tokens": 100, "output_tokens": 20, "input_tokens_details": {"cached_tokens": 60}}
        answer = {"id": "resp_1", "status": "completed", "output": [said], "usage": usage, "error": None}
        if not body.get("stream"):
            return JSONResponse(answer)
        created = {**answer, "status": "in_progress", "output": [], "usage": None}
        parts = [
            data({"type": "response.created", "response": created}, "response.created"),
            data({"type": "response.output_text.delta", "delta": "Hi"}, "response.output_text.delta"),
            data({"type": "response.completed", "response": answer}, "response.completed"),
        ]
        return StreamingResponse(self.stream(parts), media_type="text/event-stream")

    async def embeddings(self, request: Request) -> Response:
        _, refusal = await self.begin(request)
        usage = {"prompt_tokens": 1000, "total_tokens": 1000}
        return refusal or JSONResponse({"object": "list", "data": [], "usage": usage})

    async def models(self, request: Request) -> Response:
        _, refusal = await self.begin(request)
        return refusal or JSONResponse({"object": "list", "data": [{"id": "big-model-2026"}]})


class Dropped(Exception):
    """The connection ends here."""


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """The address of an app that is served while the context is open."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()
