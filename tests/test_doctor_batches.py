"""The doctor on what the settings of batches decide: limits, dimensions, groups that are played again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.cli import main
from lightning_ray.emit import reward_attributes
from lightning_ray.trajectories.advice import ADVICE
from lightning_ray.trajectories.doctor import TRAINED, Facts, Report
from lightning_ray.trajectories.settings import BatchSettings, GroupPolicy
from tests.test_doctor import Bench, failing, good, reasons
from tests.test_trajectories import model_call, span


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run" / "store")


def told(report: Report, rollout_id: str) -> tuple[str, str | None, list[tuple[str, str]]]:
    [found] = [each for each in report.diagnoses if each.rollout_id == rollout_id]
    return found.reason, found.detail, [(remark.kind, remark.text) for remark in found.remarks]


def test_each_limit_has_its_reason_with_the_figures(bench: Bench) -> None:
    for number in range(2):
        bench.rollout(f"good-{number}", good(), reward=float(number))
    bench.rollout("prompt", model_call("", [1] * 9, [3]), reward=1.0)
    bench.rollout("response", model_call("", [1, 2], [3] * 6), reward=1.0)
    bench.rollout("total", model_call("", [1] * 5, [3] * 4), reward=1.0)
    report = bench.examine(Facts(batch=BatchSettings(max_prompt_tokens=8, max_response_tokens=5, max_tokens=8)))
    assert told(report, "prompt") == ("prompt_too_long", "9 tokens, at most 8", [])
    assert told(report, "response") == ("response_too_long", "6 tokens, at most 5", [])
    assert told(report, "total") == ("too_long", "9 tokens, at most 8", [])
    assert report.counts()[TRAINED] == 2 and report.counts().keys() - {TRAINED} <= ADVICE.keys()


def test_rows_that_were_left_out_or_cut_are_remarks(bench: Bench) -> None:
    long, other = model_call("", [1, 2], [3] * 6), model_call("", [5, 6], [7])
    bench.rollout("a", long, other, reward=0.0)
    bench.rollout("b", other, reward=1.0)
    bench.rollout("c", model_call("", [9, 9], []), other, reward=1.0)
    report = bench.examine(Facts(batch=BatchSettings(max_response_tokens=5, on_response_too_long="drop_rows")))
    assert report.counts() == {TRAINED: 3}
    assert ("rows_dropped", "1 of its rows: response_too_long") in told(report, "a")[2]
    assert ("rows_dropped", "1 of its rows: no_sampled_token") in told(report, "c")[2]
    assert report.remarks().keys() <= ADVICE.keys()


def test_shaping_and_cuts_are_remarks(bench: Bench) -> None:
    bench.rollout("a", model_call("", [1, 2], [3] * 6), reward=1.0)
    bench.rollout("b", good(), reward=1.0)
    overlong: Any = {"max_tokens": 8, "cache_tokens": 4}
    settings = BatchSettings(overlong=overlong, max_tokens=6, on_too_long="truncate")
    report = bench.examine(Facts(batch=settings))
    assert reasons(report) == {"a": TRAINED, "b": TRAINED}, "shaping made the rewards differ"
    assert told(report, "a")[2] == [("rows_truncated", "1 of its rows"), ("overlong", "reward -0.5")]


def test_a_missing_dimension_is_named(bench: Bench) -> None:
    bench.rollout("a", good(), span("", attributes=reward_attributes({"correct": 1.0}, "correct")))
    report = bench.examine(Facts(batch=BatchSettings(reward_weights={"correct": 1.0, "short": 0.1})))
    assert told(report, "a") == ("no_reward", "lacks 'short'", [])


def test_a_group_that_was_played_again_is_told(bench: Bench) -> None:
    bench.rollout("fine", good(), reward=1.0)
    bench.rollout("unlucky", **failing("infrastructure"))
    report = bench.examine(Facts(batch=BatchSettings(groups=GroupPolicy(infrastructure="resample"))))
    assert reasons(report) == {"fine": "resampled", "unlucky": "infrastructure_failure"}
    assert report.counts().keys() <= ADVICE.keys()


def test_the_command_reads_the_settings_of_the_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        bench.rollout(f"good-{number}", good(), reward=float(number))
    bench.rollout("long", model_call("", [1, 2], [3] * 6), reward=1.0)
    bench.store.close()
    folder = bench.folder.parent
    batch = BatchSettings(max_tokens=5).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps({"algorithm": {"batch": batch}}))
    line = {
        "kind": "train",
        "step": 0,
        "rollouts": 3,
        "rollouts_trained": 2,
        "weight_version": 1,
        "dropped.too_long": 1,
    }
    (folder / "metrics.jsonl").write_text(json.dumps({**line, "dropped.too_long": 1}) + "\n")
    assert main(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "too_long" in shown and "1 x 8 tokens, at most 5" in shown and "batch.max_tokens" in shown
    assert "counted otherwise" not in shown
    (folder / "config.json").write_text(json.dumps({"algorithm": {"batch": {"max_token": 5}}}))
    assert main(["doctor", str(folder)]) == 2
    assert "algorithm.batch.max_token" in capsys.readouterr().err
