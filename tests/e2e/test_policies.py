"""Three policies in one run, one trained whole, one by LoRA, one frozen: each learns from its own calls and reward, and
goes on when a rank of one is killed.

Real Ray, Serve, vLLM and FSDP2: three engines and two trainer ranks.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.policy_rows import rows_of
from lightning_ray.run.run import Run
from lightning_ray.types import NamedResources, ProxyLLM, Rollout
from tests.e2e.tiny import WORDS, make_tiny_model

pytestmark = pytest.mark.e2e
TAUGHT = [("writer",), ("writer",), ("checker",), ("writer", "checker"), ()]
"""By task, the policies whose reward differs from rollout to rollout."""
TASKS = [{"question": f"w{i} w{i + 1}", "taught": taught} for i, taught in enumerate(TAUGHT)]


class WriteAndCheck(lr.LitAgent[dict[str, Any]]):
    """The writer writes and titles, the checker checks, the judge says something; words with even numbers are good."""

    async def rollout_async(self, task: dict[str, Any], resources: NamedResources, rollout: Rollout) -> None:
        async def say(policy: str, agent: str, text: str) -> str:
            llm: Any = resources[policy]
            assert isinstance(llm, ProxyLLM)
            headers = {"x-lightning-agent": agent}
            async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key, default_headers=headers) as client:
                messages: Any = [{"role": "user", "content": text}]
                answer = await client.chat.completions.create(model=llm.model, messages=messages, max_tokens=6)
            return answer.choices[0].message.content or ""

        said = {"writer": await say("writer", "write", task["question"])}
        await say("writer", "title", task["question"])
        said["checker"] = await say("checker", "check", f"{task['question']} {said['writer']}")
        await say("judge", "judge", task["question"])
        rewards = {
            name: share_of_even(words) + apart(rollout) if name in task["taught"] else 0.5
            for name, words in said.items()
        }
        lr.emit_reward({"all": sum(rewards.values()), **rewards}, primary_key="all")


def share_of_even(text: str) -> float:
    words = text.split()
    return sum(word in WORDS[::2] for word in words) / max(1, len(words)) + len(words) / 100


def apart(rollout: Rollout) -> float:
    """A little that no two rollouts share: a group whose words are as good as each other would teach nothing."""
    return zlib.crc32(rollout.rollout_id.encode()) / 2**32 / 100


def settings(steps: int) -> GRPO:
    return GRPO(
        steps=steps,
        prompts_per_step=1,
        group_size=4,
        checkpoint_every=5,
        validate_every=0,
        ranks=1,
        learning_rate=1e-2,
        warmup_steps=0,
        engine=EngineSettings(max_model_len=128, kv_cache_memory_mb=16),
        policies={
            "writer": lr.Policy(model=make_tiny_model, agents="write"),
            "checker": lr.Policy(model=make_tiny_model, lora=True, advantage="rloo"),
            "judge": lr.Policy(model=make_tiny_model, trainable=False),
        },
    )


class Learned:
    """A run, and what it leaves: digests of the weights that are served before its first step and after its last."""

    def __init__(self, path: Path, resume: bool = False, killed: str | None = None) -> None:
        folder = RunFolder(path)
        folder.create(resume)
        runners = RunnerSettings(minimum=1, maximum=1, concurrency=32)
        reporter = Reporter(Console(quiet=True))
        self.run = Run(folder, reporter, Cluster(), WriteAndCheck(), {"train": TASKS}, runners, resume)
        self._start, self.run.start = self.run.start, self._start_and_look  # type: ignore[method-assign]
        self._killed = killed
        """The policy whose rank is killed when all is up."""
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    async def to_step(self, steps: int) -> Learned:
        learning = asyncio.create_task(TrainingLoop(settings(steps), self.run).learn())
        try:
            await asyncio.wait_for(learning, 240)
            self.after = await self._digests()
            self.lines = list(self.run.folder.steps().values())
            rollout_ids = [each for line in self.lines for _, members in line["groups"] for each in members]
            self.shares = await self.run.read_shares(rollout_ids)
            self.spans = (await self.run.store.scan_spans(rollout_ids)).to_pylist()
        finally:
            learning.cancel()
            await self.run.close()
        return self

    async def _start_and_look(self, given: Any) -> None:
        await self._start(given)
        self.before = await self._digests()
        if self._killed is not None:
            [pid] = await self.run.policies[self._killed].trainers.call("pid", timeout=30.0)
            os.kill(pid, signal.SIGKILL)

    async def _digests(self) -> dict[str, Any]:
        applications = self.run.cluster.applications
        answers = {name: await applications.replicas_of(name)("digest") for name in ("writer", "judge")}
        return {name: answer["digests"] for name, [answer] in answers.items()}


async def test_each_policy_learns_from_its_own_and_what_is_frozen_stays_as_it_is(tmp_path: Path) -> None:
    learned = await Learned(tmp_path / "three").to_step(5)
    assert learned.before["judge"] == learned.after["judge"], "the frozen policy was changed"
    assert learned.before["writer"] != learned.after["writer"], "the trained policy was not"
    check_versions(learned)
    check_calls(learned)
    check_folder(learned.run)

    resumed = await Learned(tmp_path / "three", resume=True, killed="writer").to_step(6)
    assert resumed.before == learned.after, "a policy did not go on from its own checkpoint"
    assert resumed.before["judge"] == resumed.after["judge"]
    assert resumed.run.state.trainer_restarts == 1
    last = resumed.lines[-1]
    assert last["step"] == 5 and last["versions"] == {"writer": 4, "checker": 3}, "restarted ranks publish anew"
    for name, count in last["trained"].items():
        assert resumed.run.state.policies[name].version == last["versions"][name] + (count > 0)


def check_versions(learned: Learned) -> None:
    """Each moves with each of its own updates, and with nothing else."""
    run, lines = learned.run, learned.lines
    assert lines[0]["versions"] == {"writer": 0, "checker": 0}
    for name, expected in (("writer", 3), ("checker", 2)):
        assert run.state.policies[name].version == expected
        trained = [line["trained"][name] for line in lines]
        moved = [later["versions"][name] - line["versions"][name] for line, later in itertools.pairwise(lines)]
        assert moved == [int(count > 0) for count in trained[:-1]], "a version moved without an update, or stood still"
        rows = [row for row in rows_of(run.folder.metrics(), name) if row["kind"] == "train"]
        assert [row["rollouts_trained"] for row in rows] == trained
        assert [row.get("update.trained_tokens", 0) > 0 for row in rows] == [count > 0 for count in trained]


def check_calls(learned: Learned) -> None:
    """Of each rollout a policy has the call that its agent made to it, token for token, and its own reward."""
    calls = [span for span in learned.spans if span["prompt_ids"] is not None]
    assert {span["model"] for span in calls} == {"writer", "checker", "judge"}
    for name, agent in (("writer", "write"), ("checker", "check")):
        for episode in learned.shares[name]:
            [row] = episode.trajectories
            [call] = [
                span
                for span in calls
                if (span["rollout_id"], span["model"], span["agent"]) == (episode.rollout_id, name, agent)
            ]
            assert row.token_ids.tolist() == call["prompt_ids"] + call["sampled_ids"]
    for writer, checker in zip(*learned.shares.values(), strict=True):
        assert writer.outcome == checker.outcome and writer.reward is not None and checker.reward is not None
        assert np.isclose(writer.outcome, writer.reward + checker.reward)


def check_folder(run: Run) -> None:
    """Each policy's part of the summary, the checkpoint and the pictures."""
    summary = json.loads((run.folder.path / "summary.json").read_text())
    assert summary["unproved_tokens_trained"] == summary["stale_tokens_beyond_bound"] == 0
    assert summary["max_logprob_diff"] < 1e-4 and summary["swaps"] == summary["swaps_proved"]
    assert set(summary["policies"]) == {"writer", "checker"}
    latest = run.folder.latest_checkpoint()
    assert latest is not None and (latest / "writer" / "model.safetensors").is_file()
    assert (latest / "checker" / "adapter_config.json").is_file() and not (latest / "judge").exists()
    assert (run.folder.path / "training.writer.png").is_file()
