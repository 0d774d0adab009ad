"""One trace from the runner over the replica to the training step: its ids, its spans, and its way to a collector."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_ray.algorithms.source import Played, Share
from lightning_ray.capture.address import Caller
from lightning_ray.capture.call import CapturedRequest, SampledSequence
from lightning_ray.cli import main
from lightning_ray.run.state import ONLY
from lightning_ray.semconv import AGL_ANNOTATION, ATTEMPT_SPAN, DROPPED_SPAN, STEP_SPAN, TRAINED_SPAN
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.store.base import Finish
from lightning_ray.store.http.server import serve
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.store.view import open_folder
from lightning_ray.traces.ids import parent_in, root_id_of, to_header, trace_id_of
from lightning_ray.traces.training import StepTold, append_training_spans
from lightning_ray.tracing import AttemptTrace, traced
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.types import EnqueueRolloutRequest, Span

CHAT = "openai.chat.completion"
TOKEN = "a-token"


def captured(ids: tuple[str, str], parent: str | None = None) -> CapturedRequest:
    request = CapturedRequest(Caller(*ids), "chat", {"messages": [{"role": "user", "content": "a secret"}]}, "policy")
    request.parent, request.started = parent, request.started - 1
    sequence = SampledSequence([1, 2], [3, 4], [-0.5, -0.1], [7, 8], "stop", 1, 0.01, request.started + 0.02)
    request.sequences.append(sequence)
    return request


# Ids


def test_all_who_know_the_attempt_know_its_trace() -> None:
    trace, request = AttemptTrace("r", "a"), captured(("r", "a"))
    assert trace.trace_id == request.trace_id == trace_id_of("r", "a") and len(trace.trace_id) == 32
    assert trace.root_id == root_id_of("r", "a") and len(trace.root_id) == 16
    assert len({trace_id_of(*ids) for ids in (("r", "a"), ("r", "b"), ("ra", ""), ("", "ra"))}) == 4


def test_a_request_comes_from_a_span_of_its_own_trace() -> None:
    trace, span = trace_id_of("r", "a"), "00f067aa0ba902b7"
    headers = [(b"accept", b"*/*"), (b"traceparent", to_header(trace, span).encode())]
    assert parent_in(headers, trace) == span and parent_in(headers, trace_id_of("r", "b")) is None
    for value in (b"", b"00", f"00-{trace}-short-01".encode(), f"00-{trace}".encode(), b"\xff"):
        assert parent_in([(b"traceparent", value)], trace) is None
    assert parent_in([], trace) is None


# A recorded run


class Recorded:
    """A run's folder with one rollout: a client's call, captured too, a reward, and the step that was made of it."""

    def __init__(self, path: Path) -> None:
        self.run = path / "sql"
        self.core = SpanStore(self.run / "store", fsync="none")
        started = self.core.start_rollout(EnqueueRolloutRequest(input=1, rollout_id="ro-1", mode="train"), "at-1", "w")
        self.ids = (started.rollout_id, started.attempt.attempt_id)
        self.store = LocalStoreClient(self.core)

    async def play(self) -> list[Episode]:
        trace = AttemptTrace(*self.ids)
        with traced(trace):
            call = trace.begin(CHAT, {"gen_ai.prompt.0.content": "a secret", "gen_ai.request.model": "policy"})
            rows = captured(self.ids, call.span_id).take_spans()
            call.end()
            trace.add(AGL_ANNOTATION, {"agentlightning.reward.0.name": "r", "agentlightning.reward.0.value": 0.5})
        await self.store.append_spans(spans_to_batch(rows))
        await self.store.append_spans(spans_to_batch(trace.take()))
        await self.store.finish_many_attempts([Finish(*self.ids, "succeeded")])
        return await self.read()

    async def read(self) -> list[Episode]:
        rollouts = (await self.store.query_rollouts()).items
        return read_episodes(rollouts, await self.store.scan_spans(["ro-1"]), {"ro-1": "at-1"})

    async def train(self, episodes: list[Episode], step: int = 3) -> None:
        played = Played(episodes, {"ro-1": "g"}, ["g"], Account(trained=episodes))
        await append_training_spans(self.store, played, StepTold(step, {ONLY: step + 1}, 2e9, 2e9 + 1))
        line = json.dumps(played.record(step, {ONLY: step}))
        (self.run / "steps.jsonl").write_text(line + "\n")
        row = {"kind": "train", "step": step, "reward": 0.5, "update.entropy": 1.5, "validation": None}
        (self.run / "metrics.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
async def recorded(tmp_path: Path) -> AsyncIterator[Recorded]:
    made = Recorded(tmp_path)
    await made.train(await made.play())
    yield made
    await made.store.close()


async def spans_of(store: LocalStoreClient) -> list[Span]:
    return list((await store.query_spans("ro-1")).items)


async def test_a_step_is_told_in_the_traces_of_its_rollouts(recorded: Recorded) -> None:
    [told] = [span for span in await spans_of(recorded.store) if span.name == TRAINED_SPAN]
    assert told.trace_id == trace_id_of("ro-1", "at-1") and told.parent_id is None
    assert told.attributes == {
        "lightning_ray.step": 3,
        "lightning_ray.policy": ONLY,
        "lightning_ray.version": 4,
        "lightning_ray.reward": 0.5,
        "lightning_ray.tokens": 2,
        "lightning_ray.rows": 1,
    }
    assert len(told.links) == 1 and told.links[0].context.trace_id != told.trace_id
    [rollout] = (await recorded.store.query_rollouts()).items
    assert rollout.status == "succeeded"


async def test_what_is_told_afterwards_changes_no_episode(tmp_path: Path) -> None:
    run = Recorded(tmp_path)
    before = await run.play()
    await run.train(before)
    [one], [other] = before, await run.read()
    assert (one.reward, one.places, one.call_ids) == (other.reward, other.places, other.call_ids)
    assert np.array_equal(one.trajectories[0].token_ids, other.trajectories[0].token_ids)
    await run.store.close()


async def test_a_rollout_of_several_policies_is_told_of_by_each(tmp_path: Path) -> None:
    run = Recorded(tmp_path)
    [episode] = await run.play()
    account = Account(trained=[episode])
    dropped = Account(dropped={"ro-1": "no_variance", "ro-of-another-store": "no_reward"})
    shares = {"writer": Share([episode], account), "checker": Share([episode], dropped)}
    played = Played([episode], {"ro-1": "g"}, ["g"], several=shares)
    await append_training_spans(run.store, played, StepTold(0, {"writer": 5, "checker": 2}, 1.0, 2.0))
    told = {span.attributes["lightning_ray.policy"]: span for span in await spans_of(run.store) if span.links}
    assert told["writer"].name == TRAINED_SPAN and told["writer"].attributes["lightning_ray.version"] == 5
    assert told["checker"].name == DROPPED_SPAN
    assert told["checker"].attributes["lightning_ray.reason"] == "no_variance"
    assert told["writer"].links[0].context != told["checker"].links[0].context
    await append_training_spans(run.store, Played([episode], own=False, account=account), StepTold(1, {ONLY: 1}, 1, 2))
    assert len([span for span in await spans_of(run.store) if span.links]) == 2, "other runs' rollouts are not ours"
    await run.store.close()


# To a collector


@pytest.fixture
async def collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, LocalStoreClient]]:
    """A store of ours that has the rollout and none of its spans; it takes OTLP as any collector does."""
    core = SpanStore(tmp_path / "collector", fsync="none")
    core.start_rollout(EnqueueRolloutRequest(input=1, rollout_id="ro-1"), "at-1", "w")
    store = LocalStoreClient(core)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization=Bearer {TOKEN}")
    async with serve(store, token=TOKEN) as address:
        yield address, store
    await store.close()


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """The exporter's logger as it was."""
    logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http")
    handlers, propagates = list(logger.handlers), logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagates


async def test_a_trace_reaches_a_collector_whole(
    recorded: Recorded, collector: tuple[str, LocalStoreClient], capsys: pytest.CaptureFixture[str]
) -> None:
    address, store = collector
    assert await asyncio.to_thread(main, ["traces", str(recorded.run), "--endpoint", address]) == 0
    assert capsys.readouterr().out == "sent 9 spans of 1 rollout\n"
    found = {(span.name, span.attributes.get("gen_ai.usage.output_tokens")): span for span in await spans_of(store)}
    assert {span.trace_id for span in found.values()} == {trace_id_of("ro-1", "at-1")}
    root, client, call = found[ATTEMPT_SPAN, None], found[CHAT, None], found[CHAT, 2]
    assert root.span_id == root_id_of("ro-1", "at-1") and root.parent_id is None
    assert client.parent_id == root.span_id and call.parent_id == client.span_id
    assert found[AGL_ANNOTATION, None].parent_id == found[TRAINED_SPAN, None].parent_id == root.span_id
    parts = [found[f"lightning_ray.{name}", None] for name in ("queue", "prefill", "decode")]
    assert {part.parent_id for part in parts} == {call.span_id}
    edges = [parts[0].start_time, *(part.end_time for part in parts)]
    assert edges == sorted(edges) and edges[0] == call.start_time and edges[-1] == call.end_time  # type: ignore[type-var]
    assert call.attributes["lightning_ray.weight_versions"] == [7, 8]
    assert call.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    services = {span.resource.attributes["service.name"] for span in found.values()}
    assert services == {"sql/runner", "sql/policy", "sql/trainer"}
    assert "secret" not in str(found)

    assert await asyncio.to_thread(main, ["traces", str(recorded.run), "--endpoint", address, "--content"]) == 0
    assert len(await spans_of(store)) == len(found), "sent again, they are the same"


def test_content_goes_along_if_it_is_asked_for(tmp_path: Path) -> None:
    from lightning_ray.commands.traces import every_span
    from lightning_ray.traces.export import TraceExport

    made = Recorded(tmp_path)
    asyncio.run(made.play())
    view = open_folder(made.run / "store")
    for content in (False, True):
        spans = list(every_span(TraceExport("sql", content), view, list(view.query_rollouts()), {}))
        assert ("secret" in str([span.attributes for span in spans])) is content


def test_spans_of_any_form_are_sent(tmp_path: Path) -> None:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    from lightning_ray.commands.traces import every_span
    from lightning_ray.traces.export import TraceExport

    made = Recorded(tmp_path)
    attributes = {"deep": {"a": [1, {"b": None}]}, "odd": {1: "x"}, "none": None, "mixed": [1, "x"]}
    inner = Span.from_attributes(
        attributes=attributes, rollout_id="ro-1", attempt_id="at-1", span_id="mine", trace_id="t", parent_id="outer"
    )
    outer = inner.model_copy(update={"span_id": "outer", "parent_id": "nobody", "start_time": 5.0})
    asyncio.run(made.store.append_spans(spans_to_batch([inner, outer])))
    view = open_folder(made.run / "store")
    root, *spans = every_span(TraceExport("sql"), view, list(view.query_rollouts()), {})
    assert [span.parent.span_id for span in spans] == [spans[1].context.span_id, root.context.span_id]
    assert encode_spans([root, *spans]).resource_spans


def test_a_step_has_a_trace_of_its_own_that_links_to_what_it_learned_from(recorded: Recorded) -> None:
    from lightning_ray.commands.traces import every_span, figures_of
    from lightning_ray.traces.export import TraceExport

    view = open_folder(recorded.run / "store")
    export, figures = TraceExport("sql"), {3: figures_of({"reward": 0.5, "update.entropy": 1.5, "kind": "train"})}
    spans = {span.name: span for span in every_span(export, view, list(view.query_rollouts()), figures)}
    step, trained = spans[STEP_SPAN], spans[TRAINED_SPAN]
    assert [link.context.span_id for link in step.links] == [trained.context.span_id]
    assert [link.context.span_id for link in trained.links] == [step.context.span_id]
    assert step.parent is None and (step.end_time - step.start_time) == 1e9
    told: dict[str, Any] = dict(step.attributes)
    assert told["lightning_ray.rollouts_trained"] == 1 and told["lightning_ray.update.entropy"] == 1.5
    assert told["lightning_ray.version"] == 4


def test_what_cannot_be_sent_is_said(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_ray.commands.traces.REQUEST_SECONDS", 1.0)
    run = str(recorded.run)
    for arguments, message in (
        (["--endpoint", "http://127.0.0.1:9"], "collector at http://127.0.0.1:9/v1/traces did not take the spans: "),
        (["--endpoint", "collector:4318"], "give an http or https address"),
        (["--rollout", "ro-9"], "ro-9: the run has no such rollout"),
        (["--step", "9"], "has no such step"),
    ):
        assert main(["traces", run, *arguments]) == 2
        assert message in (told := capsys.readouterr().err) and "no reason was given" not in told
