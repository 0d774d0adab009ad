"""A model that is none: an OpenAI-compatible server on this machine, over real HTTP, that answers by a script.

``wishes`` is the script of most tests: the stand-in for an optimising model sees what a critique sees and no more, and
knows one trick: a note "wanted: WORD" among the runs names a word that the instructions should have.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from openai import AsyncOpenAI

Script = Callable[[dict[str, Any]], str | int]
"""The request's body -> the text that is answered, or the status of an error."""
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


class ScriptedModel:
    """Serves while the context is open; ``bodies`` keeps what was asked."""

    def __init__(self, script: Script):
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedModel:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0)

    def asked(self, kind: str) -> list[str]:
        """The questions of one kind, in the order of their coming."""
        return [body["messages"][0]["content"] for body in self.bodies if kind_of(body) == kind]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                model.bodies.append(body)
                model.keys.add(self.headers.get("authorization"))
                said = model.script(body)
                status, answer = (said, error(said)) if isinstance(said, int) else (200, completion(said, body))
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None: ...

        return Handler


def completion(text: str, body: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    made = {"id": f"chatcmpl-{id(body)}", "object": "chat.completion", "created": 1, "model": body["model"]}
    return {**made, "choices": [choice], "usage": USAGE}


def error(status: int) -> dict[str, Any]:
    return {"error": {"message": f"scripted {status}", "type": "scripted", "code": None}}


def kind_of(body: dict[str, Any]) -> str:
    """What a question is about, told by the parts that our own prompt files give it."""
    text = body["messages"][0]["content"]
    if "<review>" in text:
        return "edit"
    return "merge" if "<second>" in text else "critique" if "<instructions>" in text else "other"


def part(text: str, name: str) -> str:
    """What is between <name> and </name>."""
    found = re.search(rf"<{name}>\n(.*?)\n</{name}>", text, re.DOTALL)
    return found[1] if found else ""


def wishes(body: dict[str, Any]) -> str | int:
    """Names one missing word in its critique, and appends it to the instructions in its edit."""
    question, kind = body["messages"][0]["content"], kind_of(body)
    if kind == "merge":
        first, second = part(question, "first"), part(question, "second")
        words = dict.fromkeys([*first.split(), *second.split()])
        return f"<template>\n{' '.join(words)}\n</template>"
    instructions = part(question, "instructions")
    if kind == "critique":
        wanted = sorted(set(re.findall(r"wanted: (\w+)", question)))
        missing = [word for word in wanted if word not in instructions.split()]
        return f"missing: {missing[0]}" if missing else "nothing to say"
    word = re.search(r"missing: (\w+)", question)
    return f"<template>\n{instructions} {word[1]}\n</template>" if word else f"<template>\n{instructions}\n</template>"
