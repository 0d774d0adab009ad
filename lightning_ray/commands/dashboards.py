"""``lightning-ray dashboards``: our dashboard and alerts, where the Grafana and Prometheus of a Ray find them.

Ray writes configurations for both into its session's folder (``metrics/grafana``, ``metrics/prometheus``) when its head
starts; this puts ours beside them. Which session is always said, never guessed. Doing it again changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError

DASHBOARD = "lightning_ray.json"
ALERTS = "lightning_ray_alerts.yml"
KEY_VARIABLE = "GRAFANA_TOKEN"
GRAFANA_SECONDS = 30.0
_RULES = re.compile(r"^rule_files:[ \t]*\n([ \t]*)- ", re.M)


def add_dashboards_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "dashboards",
        help="give a Ray's Grafana and Prometheus our dashboard and alerts",
        description="Write the Grafana dashboard and the Prometheus alerts where those of a Ray find them.",
    )
    place = command.add_mutually_exclusive_group()
    place.add_argument(
        "session", nargs="?", type=Path, help="Ray's session folder on the head node, e.g. /tmp/ray/session_2026-..."
    )
    place.add_argument("--temp-dir", type=Path, metavar="DIR", help="of the Ray whose latest session is meant")
    place.add_argument("--to", type=Path, metavar="DIR", help="only write both files there")
    place.add_argument("--grafana", metavar="URL", help="only import the dashboard into the Grafana there")
    command.add_argument(
        "--key-env", default=KEY_VARIABLE, metavar="NAME", help="variable with Grafana's token (default: %(default)s)"
    )


def dashboards(given: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError for what the user can mend."""
    if given.grafana is not None:
        print(f"the dashboard is at {import_dashboard(given.grafana, os.environ.get(given.key_env))}")
        return 0
    if given.to is not None:
        done = Done()
        done.write(given.to / DASHBOARD, shipped(DASHBOARD))
        done.write(given.to / ALERTS, shipped(ALERTS))
        print("\n".join(done.lines))
        return 0
    root = metrics_root(given.session, given.temp_dir)
    print("\n".join([*install(root), *next_steps(root)]))
    return 0


def shipped(name: str) -> str:
    """A file of deployments/grafana."""
    from lightning_ray.cluster import check_packages

    check_packages()
    return (files("deployments") / "grafana" / name).read_text()


@dataclass
class Done:
    """Writes files, and tells what it did."""

    lines: list[str] = field(default_factory=list)

    def write(self, file: Path, text: str) -> None:
        """Have the file say this. Raises ConfigError if it cannot."""
        try:
            if file.is_file() and file.read_text() == text:
                self.lines.append(f"as it was  {file}")
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(f".{file.name}.draft")
            draft.write_text(text)
            os.replace(draft, file)
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be written: {error.strerror}; run this as who started that Ray"
            ) from error
        self.lines.append(f"wrote      {file}")


def metrics_root(session: Path | None, temp_dir: Path | None) -> Path:
    """The folder with Ray's ``grafana`` and ``prometheus``. Raises ConfigError if it is not said, or not there."""
    if temp_dir is not None:
        session = temp_dir / "session_latest"
    if session is None:
        raise ConfigError(
            "say which Ray is meant: give its session's folder (by default /tmp/ray/session_TIME_PID), or for the "
            "latest session of a folder --temp-dir DIR; or write both files anywhere with --to DIR"
        )
    session = session.resolve()
    for root in (session / "metrics", session):
        if (root / "prometheus" / "prometheus.yml").is_file() and (root / "grafana").is_dir():
            return root
    raise ConfigError(
        f"{session}: no folder metrics with grafana and prometheus in it. Ray's dashboard makes them when a head "
        "starts; give that session's folder, or, if RAY_METRICS_OUTPUT_ROOT was set, the folder it names"
    )


def install(root: Path) -> list[str]:
    """Put both files in their places, and have Prometheus read the alerts; returns what was done."""
    done = Done()
    done.write(dashboards_folder(root) / DASHBOARD, shipped(DASHBOARD))
    done.write(root / "prometheus" / ALERTS, shipped(ALERTS))
    configuration = root / "prometheus" / "prometheus.yml"
    done.write(configuration, with_rules(configuration.read_text()))
    return done.lines


def dashboards_folder(root: Path) -> Path:
    """Where this Ray's Grafana looks for dashboards: as Ray's provisioning says."""
    provisioning = root / "grafana" / "provisioning" / "dashboards" / "default.yml"
    said = re.search(r"^\s*path:\s*(\S.*?)\s*$", provisioning.read_text(), re.M) if provisioning.is_file() else None
    return Path(said[1]) if said else root / "grafana" / "dashboards"


def with_rules(configuration: str) -> str:
    """Prometheus's configuration with our alerts among its rules."""
    if re.search(rf"^\s*- .*{re.escape(ALERTS)}", configuration, re.M):
        return configuration
    if found := _RULES.search(configuration):
        at = found.start(1)
        return f"{configuration[:at]}{found[1]}- '{ALERTS}'\n{configuration[at:]}"
    if "\nrule_files:" in f"\n{configuration}":
        raise ConfigError(f"prometheus.yml has its rule_files in a line; add '{ALERTS}' to them, and do this again")
    return f"{configuration.rstrip()}\n\nrule_files:\n  - '{ALERTS}'\n"


def next_steps(root: Path) -> list[str]:
    """What the user does now."""
    return [
        "",
        f"prometheus --web.enable-lifecycle --config.file={root / 'prometheus' / 'prometheus.yml'}",
        f"grafana server --homepath /usr/share/grafana --config={root / 'grafana' / 'grafana.ini'}",
        "",
        "What runs already: curl -X POST http://localhost:9090/-/reload; Grafana looks for itself every few seconds.",
        "Then http://localhost:3000/d/lightning-ray, and the metrics page of Ray's dashboard. Where they are elsewhere",
        "than on the head's localhost, set RAY_PROMETHEUS_HOST and RAY_GRAFANA_HOST before `ray start`.",
    ]


def import_dashboard(url: str, key: str | None) -> str:
    """Import the dashboard by Grafana's HTTP API; returns its address. Raises ConfigError if Grafana refuses."""
    import httpx

    body = {"dashboard": {**json.loads(shipped(DASHBOARD)), "id": None}, "overwrite": True, "message": "lightning-ray"}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    base = url.rstrip("/")
    try:
        answer = httpx.post(f"{base}/api/dashboards/db", json=body, headers=headers, timeout=GRAFANA_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"--grafana {url}: {type(error).__name__}: {error}") from None
    if answer.status_code != 200:
        hint = f"; set {KEY_VARIABLE} to the token of a service account" if answer.status_code in (401, 403) else ""
        raise ConfigError(f"--grafana {url}: Grafana refuses with {answer.status_code}: {answer.text[:200]}{hint}")
    return f"{base}{answer.json().get('url', '/d/lightning-ray')}"
