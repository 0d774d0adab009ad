"""SFT's settings, and what it imitates without having played it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

import lightning_ray as lr
from lightning_ray.algorithms.imitated import ImitatedRollouts
from lightning_ray.algorithms.source import Played
from lightning_ray.commands.doctor import read_facts
from lightning_ray.policy.batch import read_batch
from lightning_ray.policy.model_folder import STATE, tokenizer_hash
from lightning_ray.progress import Reporter
from lightning_ray.recorded import open_run, read_recorded
from lightning_ray.replay import settings as replay_settings
from lightning_ray.run.folder import RunFolder
from lightning_ray.store import open_folder
from lightning_ray.trajectories.doctor import examine
from tests.test_conversations import CHATML, TALK
from tests.test_doctor import Bench
from tests.test_trajectories import model_call
from tests.tokenizers_on_the_spot import byte_level


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokenizer; nothing is trained here."""
    folder = tmp_path / "model"
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def written(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"messages": TALK, "number": number}) + "\n" for number in range(count)))
    return path


def recorded(path: Path) -> Path:
    """A run with one task, played in several groups, a failure, and an evaluation."""
    bench = Bench(path / "store")
    for rollout_id, task, reward in (("a0", "a", 0.0), ("b0", "b", 1.0), ("a1", "a", 1.0), ("b1", "b", 0.5)):
        bench.rollout(rollout_id, model_call("", [1, 2], [3, 4]), group=f"{task}{reward}", reward=reward)
    bench.rollout("f0", model_call("", [1, 2], [3, 4]), status="failed")
    bench.enqueue("v0", mode="val")
    bench.play("v0", model_call("", [1, 2], [3, 4]), reward=1.0)
    bench.store.close()
    return path


def source(settings: lr.SFT, model: Path) -> ImitatedRollouts:
    run: Any = SimpleNamespace(reporter=Reporter(), policy=SimpleNamespace(model=model))
    return ImitatedRollouts(settings, run)


async def trained(settings: lr.SFT, model: Path, steps: int = 1) -> list[list[str]]:
    """Rollout ids of each step."""
    reading = source(settings, model)
    await reading.begin()
    return [[episode.rollout_id for episode in (await reading.collect(step)).account.trained] for step in range(steps)]


async def test_an_epoch_takes_each_conversation_once_in_an_order_of_its_own(tmp_path: Path, model: Path) -> None:
    settings = lr.SFT(model=model, data=written(tmp_path / "talks.jsonl", 7), prompts_per_step=3)
    steps = await trained(settings, model, 6)
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1]
    epochs = [[name for step in epoch for name in step] for epoch in (steps[:3], steps[3:])]
    assert all(sorted(epoch) == [f"talks.jsonl-{n}" for n in range(7)] for epoch in epochs) and epochs[0] != epochs[1]
    assert await trained(settings, model, 6) == steps, "a resume comes to the same"
    [whole] = await trained(lr.SFT(model=model, data=tmp_path / "talks.jsonl"), model)
    assert len(whole) == 7


async def test_a_batch_of_conversations_is_one_the_trainer_takes(tmp_path: Path, model: Path) -> None:
    reading = source(lr.SFT(model=model, data=written(tmp_path / "talks.jsonl", 2)), model)
    await reading.begin()
    played = await reading.collect(0)
    batch = read_batch(played.batch())
    tokenizer = byte_level()
    first = slice(batch.offsets[0], batch.offsets[1])
    said = tokenizer.decode(batch.token_ids[first][batch.mask[first] == 1])
    assert said == "sunny<|im_end|>rainy again<|im_end|>" and batch.weight_versions is None
    assert sum(episode.sampled_tokens for episode in played.episodes) == 0, "nothing of it was sampled here"


async def test_recorded_rollouts_are_compared_within_their_task(tmp_path: Path, model: Path) -> None:
    run = recorded(tmp_path / "run")
    [best] = await trained(lr.SFT(model=model, data=[run], keep={"top_share": 0.25}), model)
    assert len(best) == 1 and best[0] in ("b0", "a1"), "of all four, as they are of one input"
    [good] = await trained(lr.SFT(model=model, data=run, keep={"min_reward": 0.5}), model)
    assert sorted(good) == ["a1", "b0", "b1"]
    both = lr.SFT(model=model, data=[run, written(tmp_path / "talks.jsonl", 2)], keep={"top_share": 0.5})
    assert len((await trained(both, model))[0]) == 4


async def test_data_that_is_of_no_use_is_told(tmp_path: Path, model: Path) -> None:
    run = recorded(tmp_path / "run")
    with pytest.raises(lr.ConfigError, match=r"of its 4 rollouts none is to be trained on: {'below_min_reward': 4}"):
        await trained(lr.SFT(model=model, data=run, keep={"min_reward": 2}), model)
    state = run / "checkpoints" / "step-000001" / STATE
    state.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-000001")
    (state / "progress.json").write_text(json.dumps({"tokenizer": tokenizer_hash(model)}))
    assert await trained(lr.SFT(model=model, data=run), model)
    (state / "progress.json").write_text(json.dumps({"tokenizer": "of another"}))
    with pytest.raises(lr.ConfigError, match="was played with another tokenizer"):
        await trained(lr.SFT(model=model, data=run), model)


def check(settings: lr.SFT, tasks: int = 0) -> None:
    run: Any = SimpleNamespace(train_dataset=range(tasks), cluster=SimpleNamespace(owned=False))
    settings.check(run)


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path, model: Path) -> None:
    empty, bad = written(tmp_path / "empty.jsonl", 0), tmp_path / "bad.jsonl"
    bad.write_text("{}")
    for data, complaint in ((empty, "is empty"), (tmp_path / "none", "is not there"), (bad, 'no "messages"')):
        with pytest.raises(lr.ConfigError, match=complaint):
            check(lr.SFT(model=model, data=data))
    with pytest.raises(lr.StoreError, match="holds no span store"):
        check(lr.SFT(model=model, data=tmp_path))
    with pytest.raises(lr.ConfigError, match="train_dataset is empty"):
        check(lr.SFT(model=model))
    for given, complaint in (
        ({"batch": {"groups": {"alone": "keep"}}}, "groups and credit by step have no part in SFT"),
        ({"template_arguments": {"a": 1}}, "template_arguments are for conversations of data"),
        ({"keep": {"top_share": 0}}, r"algorithm\.keep\.top_share=0"),
        ({"clip_low": 0.1}, "there is no such setting"),
    ):
        with pytest.raises(lr.ConfigError, match=complaint):
            lr.SFT(model=model, **given)


def test_the_ranks_train_likelihood() -> None:
    played = lr.SFT(model="m", loss_aggregation="rollout-mean", lora={"rank": 4}).update_settings(Path("m"))
    assert (played.objective, played.check_logprobs, played.loss_aggregation) == ("likelihood", True, "rollout-mean")
    assert played.lora.rank == 4 and played.warmup_steps == 0
    assert not lr.SFT(model="m", data="talks.jsonl").update_settings(Path("m")).check_logprobs
    with pytest.raises(lr.ConfigError, match="needs schedule_steps"):
        lr.SFT(model="m", schedule="cosine").update_settings(Path("m"))


def test_a_filter_is_a_function_and_its_name_is_kept() -> None:
    settings = lr.SFT(model="m", keep=lr.Keep(filter=bool)).settings()
    assert "bool" in json.dumps(settings, default=str)


def test_a_replay_of_what_is_no_grpo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"algorithm": {"name": "SFT", **lr.SFT(model="m").settings()}}))
    with pytest.raises(lr.ConfigError, match=r"its algorithm is SFT, which has data, .*keep.*; a replay"):
        replay_settings.recorded(tmp_path)


def test_the_doctor_knows_what_was_kept_and_what_a_filter_did(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store")
    for rollout_id, reward in (("a", 0.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)):
        bench.rollout(rollout_id, model_call("", [1, 2], [3]), reward=reward)
    settings = lr.SFT(
        model="m", keep={"min_reward": 0.5, "top_share": 0.25, "filter": lambda each: each.rollout_id != "b"}
    )
    episodes = [each for part in read_recorded(open_run(tmp_path)) for each in part.episodes()]
    group_of = dict.fromkeys("abcd", "g")
    played = Played(episodes, group_of, ["g"], settings.settle(episodes, group_of, None))
    bench.store.close()
    config = {"algorithm": {"name": "SFT", **settings.settings()}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    RunFolder(tmp_path).append_step(played.record(0, {"policy": 0}))
    dropped = {f"dropped.{reason}": count for reason, count in played.account.drops_by_reason().items()}
    row = {"kind": "train", "step": 0, "weight_version": 1, "rollouts": 4, "rollouts_trained": 1, **dropped}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    report = examine(open_folder(tmp_path / "store"), read_facts(tmp_path))
    verdicts = {each.rollout_id: each.reason for each in report.diagnoses}
    assert verdicts == {"a": "below_min_reward", "b": "filtered_out", "c": "trained", "d": "not_among_best"}
    assert report.contradictions == []


async def test_of_a_run_with_several_policies_one_is_imitated(tmp_path: Path, model: Path) -> None:
    bench = Bench(tmp_path / "run" / "store")
    calls = [{**model_call("", [1, 2], [3 + index]), "model": name} for index, name in enumerate(("writer", "editor"))]
    bench.rollout("a", *calls, reward=1.0)
    bench.store.close()
    policies = {name: {"trainable": True, "agents": name, "model": "m"} for name in ("writer", "editor")}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"algorithm": {"name": "GRPO", "policies": policies}}))
    for chosen, sampled in ((None, 3), ("writer", 3), ("editor", 4)):
        reading = source(lr.SFT(model=model, data=tmp_path / "run", data_policy=chosen), model)
        await reading.begin()
        [row] = (await reading.collect(0)).batch()["token_ids"].to_pylist()
        assert row == [1, 2, sampled]
    with pytest.raises(lr.ConfigError, match="there is no such policy; did you mean 'editor'"):
        check(lr.SFT(model=model, data=tmp_path / "run", data_policy="editer"))
