"""The Grafana dashboard and the Prometheus alerts: of the metrics that there are, and put where Ray's own look."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ray.cli import main
from lightning_ray.commands.dashboards import ALERTS, DASHBOARD, shipped, with_rules
from lightning_ray.errors import ConfigError
from lightning_ray.metrics.catalogue import METRICS

SERIES = {series: metric for metric in METRICS.values() for series in metric.series}
_SELECTED = re.compile(r"(ray_lightning_ray_\w+)(?:\{([^}]*)\})?")
_BY = re.compile(r"(?:by|on|ignoring) \(([^)]*)\)")
_LABEL = re.compile(r'(\w+)=~?"')


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(shipped(DASHBOARD))["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(shipped(ALERTS))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> list[str]:
    told = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*told, *(rule["expr"] for rule in rules())]


def test_every_series_that_is_asked_for_is_exported_with_the_labels_asked_for() -> None:
    for expression in expressions():
        found = _SELECTED.findall(expression)
        assert found, expression
        tags = set.intersection(*({*SERIES[series].tags, "le"} for series, _ in found))
        for series, selector in found:
            labels = set(_LABEL.findall(selector))
            assert labels <= set(SERIES[series].tags), expression
        grouped = {label.strip() for group in _BY.findall(expression) for label in group.split(",")}
        assert grouped <= tags | {"le"}, expression


def test_every_metric_is_on_a_panel() -> None:
    shown = {SERIES[series].name for panel in panels() for target in panel["targets"]
             for series, _ in _SELECTED.findall(target["expr"])}  # fmt: skip
    assert shown == set(METRICS)


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(shipped(DASHBOARD))
    assert dashboard["uid"] == "lightning-ray" and dashboard["schemaVersion"] >= 39 and "id" not in dashboard
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "run"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"] and panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
        assert all('run=~"$run"' in target["expr"] for target in panel["targets"]), panel["title"]


def test_alerts_say_whose_they_are_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) and all(name.startswith("LightningRay") for name in names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert "$labels.run" in rule["annotations"]["summary"] and rule["annotations"]["description"]
        used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert used <= {label.strip() for group in _BY.findall(rule["expr"]) for label in group.split(",")}, rule


# The command


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A session's folder as Ray's dashboard leaves it, by Ray's own templates."""
    from ray.dashboard.modules.metrics import templates

    metrics = tmp_path / "ray" / "session_2026-11-28_1" / "metrics"
    provisioning = metrics / "grafana" / "provisioning" / "dashboards"
    provisioning.mkdir(parents=True)
    (metrics / "prometheus").mkdir()
    (provisioning / "default.yml").write_text(
        templates.DASHBOARD_PROVISIONING_TEMPLATE.format(dashboard_output_folder=metrics / "grafana" / "dashboards")
    )
    (metrics / "prometheus" / "prometheus.yml").write_text(
        templates.PROMETHEUS_YML_TEMPLATE.format(prom_metrics_service_discovery_file_path=tmp_path / "targets.json")
    )
    (tmp_path / "ray" / "session_latest").symlink_to(metrics.parent)
    return metrics.parent


def test_both_are_put_where_that_ray_s_own_are(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards", str(session)]) == 0
    told = capsys.readouterr().out
    metrics = session / "metrics"
    assert json.loads((metrics / "grafana" / "dashboards" / DASHBOARD).read_text())["uid"] == "lightning-ray"
    configuration = yaml.safe_load((metrics / "prometheus" / "prometheus.yml").read_text())
    assert configuration["rule_files"] == [ALERTS] and configuration["scrape_configs"][0]["job_name"] == "ray"
    assert yaml.safe_load((metrics / "prometheus" / ALERTS).read_text())["groups"]
    assert told.count("wrote") == 3 and f"--config.file={metrics / 'prometheus' / 'prometheus.yml'}" in told

    assert main(["dashboards", "--temp-dir", str(session.parent)]) == 0
    again = capsys.readouterr().out
    assert again.count("as it was") == 3 and str(session) in again and "session_latest" not in again


def test_a_dashboards_folder_of_the_user_s_own_is_used(session: Path, tmp_path: Path) -> None:
    provisioning = session / "metrics" / "grafana" / "provisioning" / "dashboards" / "default.yml"
    provisioning.write_text(f"providers:\n  - name: Ray\n    options:\n      path: {tmp_path / 'mine'}\n")
    assert main(["dashboards", str(session)]) == 0
    assert (tmp_path / "mine" / DASHBOARD).is_file()


def test_no_ray_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards"]) == 2
    assert "say which Ray is meant" in capsys.readouterr().err
    assert main(["dashboards", str(tmp_path)]) == 2
    assert "no folder metrics" in capsys.readouterr().err
    assert main(["dashboards", "--to", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [DASHBOARD, ALERTS]


def test_rules_of_others_stay() -> None:
    for before in ("a: 1\nrule_files:\n  - 'x.yml'\nb: 2\n", "rule_files:\n- x.yml\n"):
        after = with_rules(before)
        assert yaml.safe_load(after) == {**yaml.safe_load(before), "rule_files": [ALERTS, "x.yml"]}
        assert with_rules(after) == after
    with pytest.raises(ConfigError, match="in a line"):
        with_rules("rule_files: [x.yml]\n")


@pytest.fixture
def grafana() -> Iterator[tuple[str, list[Any]]]:
    """What takes imports as Grafana does, from who has the token."""
    taken: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            allowed = self.headers["Authorization"] == "Bearer right"
            answer = json.dumps({"url": "/d/lightning-ray/x"} if allowed else {"message": "Unauthorized"}).encode()
            if allowed:
                taken.append((self.path, body))
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", taken
    server.shutdown()


def test_the_dashboard_is_imported_over_http(
    grafana: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, taken = grafana
    assert main(["dashboards", "--grafana", url]) == 2
    assert "401" in (refused := capsys.readouterr().err) and "GRAFANA_TOKEN" in refused
    monkeypatch.setenv("GRAFANA_TOKEN", "right")
    assert main(["dashboards", "--grafana", url]) == 0
    [(path, body)] = taken
    assert path == "/api/dashboards/db" and body["overwrite"] and body["dashboard"]["uid"] == "lightning-ray"
    assert capsys.readouterr().out.strip().endswith(f"{url}d/lightning-ray/x")
    assert main(["dashboards", "--grafana", "http://127.0.0.1:9/"]) == 2
