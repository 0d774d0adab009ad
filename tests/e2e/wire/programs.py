"""Clients that are programs of their own: curl, and OpenAI's client for Node."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from lightning_ray.agent_names import AGENT_HEADER
from tests.e2e.wire.clients import MESSAGES, QUESTION, Heard
from tests.e2e.wire.served import MODEL, Session

NODE = Path(__file__).parent / "node"
AGENT = "by-header"
SECONDS = 90
INSTALL_SECONDS = 300


async def curl(session: Session) -> Heard:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {session.key}", "Content-Type": "application/json", AGENT_HEADER: AGENT}
    given = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    output = await program("curl", "-sSN", f"{session.base}/chat/completions", *given, "-d", json.dumps(body))
    events = output.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    text, thought = ("".join(delta.get(key) or "" for delta in deltas) for key in ("content", "reasoning"))
    return Heard(text, thought, chunks[-1]["usage"]["completion_tokens"], chunks, "chat", agent=AGENT)


def node(way: str) -> Callable[[Session], Awaitable[Heard]]:
    """OpenAI's client for Node; ``way`` is client.mjs's."""

    async def call(session: Session) -> Heard:
        script = await installed() / "client.mjs"
        heard = json.loads(await program("node", str(script), session.base, session.key, MODEL, QUESTION, way, AGENT))
        name = "openai.response" if way.startswith("responses") else "openai.chat.completion"
        return Heard(**heard, api=way.partition("-")[0], name=name, agent=AGENT)

    call.__name__ = "node_" + way.replace("-", "_")
    return call


async def installed() -> Path:
    """A folder with the script and the client that it needs, installed once in a version."""
    version = json.loads((NODE / "package.json").read_text())["dependencies"]["openai"]
    folder = Path(tempfile.gettempdir()) / f"lightning-ray-node-openai-{version}"
    shutil.copytree(NODE, folder, dirs_exist_ok=True)
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        options = ("--no-audit", "--no-fund", "--no-package-lock", "--fetch-retries=5")
        await program("npm", "install", "--prefix", str(folder), *options, seconds=INSTALL_SECONDS)
    return folder


async def program(*command: str, seconds: float = SECONDS) -> str:
    """What it printed. Raises AssertionError with what it complained of."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(seconds):
        output, complaint = await process.communicate()
    assert process.returncode == 0, f"{command[0]}: {complaint.decode()}"
    return output.decode()
