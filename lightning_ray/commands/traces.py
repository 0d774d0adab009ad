"""``lightning-ray traces``: a run's traces to a collector (Jaeger, Tempo, any that takes OTLP over HTTP).

Reads the run's folder, at work or finished; nothing is asked of its processes, and nothing is changed. Exporting again
sends the same ids again, which collectors keep once, or show twice.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_ray.commands.spans import store_folder
from lightning_ray.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from lightning_ray.store.view import StoreView
    from lightning_ray.traces.export import TraceExport
    from lightning_ray.types import Rollout

PORTION = 256
"""Rollouts whose spans are held at once."""
BUNDLE = 512
"""Spans of one request."""
REQUEST_SECONDS = 30.0


def add_traces_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "traces",
        help="send a run's traces to an OpenTelemetry collector",
        description="Send the traces of a run's rollouts and training steps to a collector, by OTLP over HTTP.",
    )
    command.add_argument(
        "folder", nargs="?", type=Path, help="a run's folder, or its store's (default: the run last written in runs/)"
    )
    command.add_argument(
        "--endpoint",
        metavar="URL",
        help="the collector's, e.g. http://collector:4318 (default: as OTEL_EXPORTER_OTLP_ENDPOINT says; further "
        "variables of OpenTelemetry's, such as OTEL_EXPORTER_OTLP_HEADERS, count too)",
    )
    command.add_argument("--rollout", action="append", metavar="ID", help="only this one; may be given again")
    command.add_argument("--step", type=int, metavar="N", help="only the rollouts of one training step, from 0")
    command.add_argument("--content", action="store_true", help="with what was said to and by models")


def traces(given: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError and StoreError for what the user can mend."""
    from lightning_ray.run.folder import RunFolder
    from lightning_ray.store.view import open_folder

    folder = store_folder(given.folder)
    run = folder.parent if folder.name == "store" else folder
    send = sender(given.endpoint)

    from lightning_ray.traces.export import TraceExport, bundles

    view: Any = open_folder(folder)
    rollouts = chosen(view, given.rollout, None if given.step is None else step_ids(RunFolder(run), given.step))
    export = TraceExport(run.resolve().name, given.content)
    figures = {row["step"]: figures_of(row) for row in RunFolder(run).metrics() if row["kind"] == "train"}
    sent = 0
    for bundle in bundles(every_span(export, view, rollouts, figures), BUNDLE):
        send(bundle)
        sent += len(bundle)
    print(f"sent {sent} spans of {len(rollouts)} rollout{'s' * (len(rollouts) != 1)}")
    return 0


def chosen(view: StoreView, ids: Sequence[str] | None, of_step: frozenset[str] | None) -> list[Rollout]:
    """The rollouts that are meant, in order. Raises ConfigError if there is none."""
    found = list(view.query_rollouts({"rollout_id_in": ids} if ids else None))
    if missing := set(ids or ()) - {rollout.rollout_id for rollout in found}:
        raise ConfigError(f"--rollout {sorted(missing)[0]}: the run has no such rollout")
    found = [rollout for rollout in found if of_step is None or rollout.rollout_id in of_step]
    if not found:
        raise ConfigError("there is no rollout to send; see lightning-ray spans 'SELECT * FROM rollouts'")
    return found


def step_ids(folder: Any, step: int) -> frozenset[str]:
    """The rollouts that a step was made of. Raises ConfigError if it is not known."""
    line = folder.steps().get(step)
    if line is None:
        raise ConfigError(f"--step {step}: {folder.path}/steps.jsonl has no such step")
    return frozenset(rollout_id for _, ids in line["groups"] for rollout_id in ids)


def figures_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a step's span tells of its row in metrics.jsonl."""
    return {f"lightning_ray.{name}": value for name, value in row.items() if isinstance(value, (int, float))}


def every_span(
    export: TraceExport, view: Any, rollouts: Sequence[Rollout], figures: dict[int, dict[str, Any]]
) -> Iterator[ReadableSpan]:
    """Those of all attempts, then those of the steps that these tell of."""
    for first in range(0, len(rollouts), PORTION):
        yield from _of_portion(export, view, rollouts[first : first + PORTION])
    yield from export.steps(figures)


def _of_portion(export: TraceExport, view: Any, rollouts: Sequence[Rollout]) -> Iterator[ReadableSpan]:
    from lightning_ray.store.schema import read_spans

    table = view.scan_spans([rollout.rollout_id for rollout in rollouts])
    captured = table.filter(table["prompt_ids"].is_valid())
    versions = (found or () for found in captured["weight_versions"].to_pylist())
    calls = dict(zip(captured["span_id"].to_pylist(), versions, strict=True))
    spans = defaultdict(list)
    for span in read_spans(table):
        spans[span.rollout_id, span.attempt_id].append(span)
    for rollout in rollouts:
        for attempt in view.query_attempts(rollout.rollout_id):
            yield from export.attempt(rollout, attempt, spans[rollout.rollout_id, attempt.attempt_id], calls)


class _LastWords(logging.Handler):
    """Keeps what the exporter logged last: it tells reasons in no other way."""

    text = "no reason was given"

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def sender(endpoint: str | None) -> Any:
    """What sends spans, many at once. Raises ConfigError without the exporter, and if the collector refuses."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import SpanExportResult
    except ImportError:
        raise ConfigError(
            "traces: needs OpenTelemetry's exporter, which is not installed: pip install 'lightning-ray[otlp]'"
        ) from None
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(f"--endpoint {endpoint}: give an http or https address, e.g. http://localhost:4318")
    if endpoint is not None and urlsplit(endpoint).path in ("", "/"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=REQUEST_SECONDS)
    last_words = _LastWords()
    logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http")
    logger.addHandler(last_words)
    logger.propagate = False

    def send(spans: Sequence[ReadableSpan]) -> None:
        if exporter.export(spans) is not SpanExportResult.SUCCESS:
            raise ConfigError(f"the collector at {exporter._endpoint} did not take the spans: {last_words.text}")

    return send
