"""The direct line to the store's process: what is sent arrives, and what it cannot carry goes through Ray."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pyarrow as pa
import pytest
import pytest_asyncio

from lightning_ray.store import line as line_module
from lightning_ray.store.line import Answer, Dialer, Envelope, Line, LineLost, LineServer
from lightning_ray.store.post import Call, Post

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no line on other systems")


class Store:
    """Answers each call with its own message and its buffers, and stands for its actor's handle."""

    def __init__(self) -> None:
        self.by_line = self.by_ray = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.server = LineServer(self.on_line)
        self.calls = SimpleNamespace(remote=self.on_ray)
        self.line = SimpleNamespace(remote=self.server.address)

    async def on_line(self, envelopes: Sequence[Envelope], buffers: list[pa.Buffer]) -> list[Answer]:
        self.by_line += 1
        await self.gate.wait()
        return answers(envelopes, buffers)

    async def on_ray(self, envelopes: Sequence[Envelope], buffers: list[pa.Buffer]) -> list[Answer]:
        self.by_ray += 1
        return answers(envelopes, buffers)


def answers(envelopes: Sequence[Envelope], buffers: list[pa.Buffer]) -> list[Answer]:
    found, first = [], 0
    for message, _, own in envelopes:
        if message == b"defect":
            raise KeyError("defect")
        found.append((message, buffers[first : first + own]))
        first += own
    return found


@pytest_asyncio.fixture
async def store() -> AsyncIterator[Store]:
    store = Store()
    yield store
    store.server.close()


async def dial(dialer: Dialer) -> Line:
    async with asyncio.timeout(5.0):
        while (line := dialer.line()) is None:
            await asyncio.sleep(0.001)
    return line


async def ask(post: Post, message: bytes, *buffers: bytes, apart: bool = False) -> tuple[bytes, list[bytes]]:
    given = [pa.py_buffer(buffer) for buffer in buffers]
    answer, own = await post.send(Call(message, given, None), apart)
    return answer, [buffer.to_pybytes() for buffer in own]


async def test_messages_of_any_size_arrive_whole_and_each_gets_its_own_answer(store: Store) -> None:
    line = await dial(Dialer(store))
    sizes = (0, 1, 100, 70_000, 3_000_000)
    sent = [line.send([(b"%d" % size, None, 2)], [pa.py_buffer(bytes(size)), pa.py_buffer(b"x")]) for size in sizes]
    for size, [(message, (first, second))] in zip(sizes, await asyncio.gather(*sent), strict=True):
        assert (message, first.size, second.to_pybytes()) == (b"%d" % size, size, b"x")


async def test_a_post_uses_the_line_once_it_stands(store: Store) -> None:
    post = Post(store)
    assert await ask(post, b"a", b"1") == (b"a", [b"1"])
    await dial(post._dialer)
    assert await asyncio.gather(ask(post, b"b"), ask(post, b"c", b"2", b"3")) == [(b"b", []), (b"c", [b"2", b"3"])]
    assert (store.by_ray, store.by_line) == (1, 1)
    large = bytes(2**18 + 1)
    assert await ask(post, b"large", large) == (b"large", [large])
    assert await ask(post, b"apart", apart=True) == (b"apart", [])
    assert (store.by_ray, store.by_line) == (3, 1)


def test_uvloop_has_lines_too() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def one() -> tuple[bytes, list[bytes]]:
        store = Store()
        post = Post(store)
        await dial(post._dialer)
        try:
            return await ask(post, b"a", bytes(100_000))
        finally:
            store.server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(one()) == (b"a", [bytes(100_000)])


async def test_a_defect_of_the_store_is_told(store: Store) -> None:
    post = Post(store)
    await dial(post._dialer)
    with pytest.raises(RuntimeError, match="KeyError: 'defect'"):
        await ask(post, b"defect")


async def test_what_a_broken_line_lost_goes_through_ray_and_a_new_line_is_opened(store: Store) -> None:
    post = Post(store)
    line = await dial(post._dialer)
    store.gate.clear()
    pending = asyncio.create_task(ask(post, b"a"))
    async with asyncio.timeout(5.0):
        while not store.by_line:
            await asyncio.sleep(0.001)
    line.close()
    assert await pending == (b"a", [])
    assert store.by_ray == 1
    with pytest.raises(LineLost):
        line.send([(b"late", None, 0)], [])
    store.gate.set()
    assert await dial(post._dialer) is not line
    assert await ask(post, b"b") == (b"b", [])
    assert (store.by_ray, store.by_line) == (1, 2)


async def test_without_a_line_all_goes_through_ray(store: Store) -> None:
    async def elsewhere() -> str:
        return "the-store-of-another-machine"

    store.line = SimpleNamespace(remote=elsewhere)
    post = Post(store)
    for number in range(3):
        assert await ask(post, b"%d" % number) == (b"%d" % number, [])
        await asyncio.sleep(0.01)
    assert (store.by_ray, store.by_line) == (3, 0)


async def test_another_users_process_is_not_let_in(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "_user_of", lambda connection: -1)
    address = await store.server.address()
    assert address is not None
    line = await line_module._connect(address)
    with pytest.raises(LineLost):
        await line.send([(b"a", None, 0)], [])
    assert store.by_line == 0
