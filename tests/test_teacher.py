"""Asking a teacher: what is sent, what is tried again, and what is told when it cannot help."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pytest

import lightning_ray as lr
from lightning_ray.algorithms.distill import with_teacher
from lightning_ray.teacher import LEAST, Teacher

Answer = tuple[int, Any]
Endpoint = tuple[lr.Upstream, list[dict[str, Any]], list[Answer]]


def likely(request: dict[str, Any]) -> Answer:
    """Each token is the less likely the higher its id."""
    told = [None, *(-float(each) for each in request["prompt"][1:])]
    text = " ".join(f"w{each}" for each in request["prompt"])
    return 200, {"choices": [{"text": text, "logprobs": {"token_logprobs": told}}]}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """An endpoint, what it was asked (with the key), and what it answers before it answers as it should."""
    asked: list[dict[str, Any]] = []
    first: list[Answer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({**request, "path": self.path, "key": self.headers.get("authorization")})
            status, body = first.pop(0) if first else likely(request)
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(payload)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield lr.Upstream(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="large", retries=2), asked, first
    server.shutdown()
    server.server_close()


def test_rows_are_scored_in_order(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, asked, _ = endpoint
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher = Teacher(upstream.model_copy(update={"api_key_env": "TEACHER_KEY"}))
    rows = [[7, 1, 2], [7, 3], [7, 4, 5, 6, 99]]
    batch = pa.table({"token_ids": pa.array(rows, pa.list_(pa.int32()))})
    told = with_teacher(batch, teacher)["teacher_logprobs"].to_pylist()
    assert told == [[0, -1, -2], [0, -3], [0, -4, -5, -6, LEAST]]
    assert {(each["path"], each["key"], each["model"]) for each in asked} == {
        ("/v1/completions", "Bearer secret", "large")
    }
    wanted = {"echo": True, "logprobs": 1, "max_tokens": 0}
    assert all(each.items() >= wanted.items() for each in asked)
    assert sorted(each["prompt"] for each in asked) == sorted(rows)


def test_what_may_pass_is_tried_again(endpoint: Endpoint) -> None:
    upstream, asked, first = endpoint
    first += [(503, {"error": "busy"}), (429, {"error": "later"})]
    assert Teacher(upstream).logprobs([[1, 2]])[0].tolist() == [0, -2] and len(asked) == 3
    first += [(503, {"error": "busy"})] * 3
    with pytest.raises(lr.InfrastructureError, match=r"goes on failing: 503 .*busy"):
        Teacher(upstream).logprobs([[1, 2]])


def test_what_will_not_pass_is_told(endpoint: Endpoint) -> None:
    upstream, asked, first = endpoint
    first += [(404, {"error": "no model 'large'"})]
    with pytest.raises(lr.ConfigError, match=r"refuses 2 token ids to score: 404 .*no model"):
        Teacher(upstream).logprobs([[1, 2]])
    assert len(asked) == 1
    for logprobs in (None, {"token_logprobs": [None]}, {"token_logprobs": [None, None]}):
        first += [(200, {"choices": [{"logprobs": logprobs}]})]
        with pytest.raises(lr.ConfigError, match="no log probability for each token of the prompt"):
            Teacher(upstream).logprobs([[1, 2]])
    gone = lr.Upstream(base_url="http://127.0.0.1:9/v1", model="large", retries=1)
    with pytest.raises(lr.InfrastructureError, match=r"cannot be reached \(2 tries"):
        Teacher(gone).logprobs([[1, 2]])
    for wrong in ({"model": None}, {"kind": "anthropic"}):
        with pytest.raises(lr.ConfigError, match="of an endpoint that speaks OpenAI's API"):
            Teacher(upstream.model_copy(update=wrong))


class Words:
    """A tokenizer whose id n is the word that ``name`` makes of it."""

    all_special_ids = (0,)

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._count = count
        self._name = name

    def __len__(self) -> int:
        return self._count

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(self._name, ids))


def test_a_tokenizer_is_known_by_what_it_decodes(endpoint: Endpoint) -> None:
    upstream, asked, first = endpoint
    teacher = Teacher(upstream)
    teacher.check_tokenizer(Words(3000, lambda each: f"w{each}"))
    sent = [each for request in asked for each in request["prompt"]]
    assert len(sent) > 500 and 0 not in sent and 2999 in sent and all(len(r["prompt"]) <= 64 for r in asked)
    with pytest.raises(lr.ConfigError, match=r"another tokenizer .* are 'w.*' to it and 'v"):
        teacher.check_tokenizer(Words(3000, lambda each: f"v{each}"))
    first += [(400, {"error": "token id 2999 is out of vocabulary"})]
    with pytest.raises(lr.ConfigError, match="out of vocabulary"):
        teacher.check_tokenizer(Words(3000, lambda each: f"w{each}"))


def test_settings() -> None:
    upstream = lr.Upstream(base_url="http://teacher/v1", model="large", api_key="secret")
    alone = lr.Distill(model="m", teacher=upstream)
    assert (alone.group_size, alone.reward_weight) == (1, 0.0)
    assert "secret" not in json.dumps(alone.settings(), default=str)
    update = lr.Distill(model="m", teacher=upstream, reward_weight=0.5, group_size=4).update_settings(Path("m"))
    assert (update.teacher_weight, update.reward_weight) == (1.0, 0.5)
    with pytest.raises(lr.ConfigError, match=r"reward_weight=0\.5 compares the rollouts of a task"):
        lr.Distill(model="m", teacher=upstream, reward_weight=0.5)
    with pytest.raises(lr.ConfigError, match=r"algorithm\.teacher is required"):
        lr.Distill(model="m")
