"""Where the local place of a URL is, and which URL a place is of.

    s3://bucket/runs/sql   <->   CACHE/lightning-ray-urls/s3/bucket/runs/sql

The same on every node but for the cache, so that a path says it all: a process that is handed one knows where its
content is to be had (``pull.present``). LIGHTNING_RAY_CACHE is the cache, on a disk of the node's own.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from urllib.parse import quote, unquote

from lightning_ray.errors import ConfigError

CACHE = "LIGHTNING_RAY_CACHE"
MARK = "lightning-ray-urls"
ROOTED = ("file", "local")
"""Protocols whose paths begin at a root and not with a bucket or host."""
_KEPT = ":=+@,~"


def is_url(text: str | PurePath) -> bool:
    """Whether it names a place on another storage, as ``s3://bucket/runs``."""
    return "://" in str(text)


def place_of(url: str) -> Path:
    """The local place of a URL. Raises ConfigError for one that cannot be a folder's."""
    protocol, _, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part]
    if not protocol.isidentifier() or not parts or {".", ".."} & set(parts):
        raise ConfigError(f"{url!r} is no folder's URL: give one as s3://bucket/runs, without '.' and '..' in it")
    if ":" in parts[0].rpartition("@")[0]:
        raise ConfigError(
            f"{protocol}://...@{parts[0].rpartition('@')[2]}/... holds a password, which paths and logs would tell: "
            "give it by the environment, or by fsspec's own configuration"
        )
    return cache() / MARK / protocol / Path(*(quote(part, safe=_KEPT) for part in parts))


def url_of(path: Path) -> str | None:
    """The URL that a path is the local place of; None for all others."""
    if MARK not in path.parts:
        return None
    protocol, *rest = path.parts[path.parts.index(MARK) + 1 :]
    return f"{protocol}://{'/' * (protocol in ROOTED)}{'/'.join(map(unquote, rest))}"


def run_place(runs_dir: str | Path, name: str) -> Path:
    """The folder of a run, or the local place of its URL."""
    if is_url(runs_dir):
        return place_of(f"{str(runs_dir).rstrip('/')}/{name}")
    return (Path(runs_dir) / name).absolute()


def cache() -> Path:
    """Where this node keeps what belongs to URLs."""
    given = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lightning-ray")
    return Path(given).expanduser().absolute()
