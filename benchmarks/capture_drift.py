"""How often do a conversation's ids drift when its text is read anew, without and with continuation of ids?"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from rich.progress import Progress

from benchmarks.capture_client import request_of
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.store import Store
from lightning_ray.trajectories.join import ModelCall
from lightning_ray.trajectories.prefix import find_breaks

TURNS = 6
SAMPLED = 24
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
MODEL = "policy"


class Turns(NamedTuple):
    """Turns that continued a text as text, and those of them whose ids did not continue its ids."""

    all: int
    drifted: int


async def drift(
    replica: Any, client: Any, store: Store, url: str, secret: bytes, chats: int, progress: Progress
) -> dict[str, Any]:
    """The same chats without and with continuation, sampled by the real engine."""
    bar = progress.add_task("drift of tokens", total=2 * chats)
    found = {}
    questions = [messages[1]["content"].split(" ") for messages in await replica.prompts.remote(chats, 120)]
    for is_on in (False, True):
        await replica.continue_conversations.remote(is_on)
        turns = []
        for words in questions:
            started = await store.start_rollout({"question": words[0]}, mode="train")
            claims = Claims(started.rollout_id, started.attempt.attempt_id, time.time() + 3600, SAMPLING)
            await chat(client, url, issue_key(secret, claims), words)
            turns.append(await turns_of(replica, store, started.rollout_id))
            progress.advance(bar)
        found[is_on] = Turns(sum(each.all for each in turns), sum(each.drifted for each in turns))
    return {
        "drift_turns_without": found[False].drifted,
        "drift_turns_with": found[True].drifted,
        "drift_turns_of": [found[False].all, found[True].all],
    }


async def chat(client: Any, url: str, key: str, words: list[str]) -> None:
    """A conversation of some turns, the user's parts being of the words."""
    messages: list[dict[str, str]] = []
    share = len(words) // TURNS
    for turn in range(TURNS):
        messages.append({"role": "user", "content": " ".join(words[turn * share : (turn + 1) * share])})
        body = {
            "model": MODEL,
            "messages": messages,
            "max_tokens": SAMPLED,
            "skip_special_tokens": False,
            "seed": turn,
        }
        request = request_of(f"{url}/v1/chat/completions", key, json.dumps(body).encode())
        [answer] = await client.burst.remote([request])
        messages.append({"role": "assistant", "content": json.loads(answer)["choices"][0]["message"]["content"]})


async def turns_of(replica: Any, store: Store, rollout_id: str) -> Turns:
    """What became of a rollout's turns after the first."""
    spans = await store.scan_spans([rollout_id])
    rows = spans.filter(pc.is_valid(spans["prompt_ids"])).sort_by("start_time").to_pylist()
    names = ("prompt_ids", "sampled_ids", "logprobs", "weight_versions")
    calls = [ModelCall(*(np.asarray(row[name]) for name in names)) for row in rows]
    broken = {each.turn for each in find_breaks(calls)}
    continued = []
    for turn, (before, now) in enumerate(itertools.pairwise(rows), 2):
        said = await replica.text.remote(before["prompt_ids"] + before["sampled_ids"])
        if (await replica.text.remote(now["prompt_ids"])).startswith(said):
            continued.append(turn)
    if len(rows) != TURNS:
        raise RuntimeError(f"{len(rows)} of {TURNS} turns of rollout {rollout_id} were captured")
    return Turns(len(continued), len(broken.intersection(continued)))
