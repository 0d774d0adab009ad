"""A folder behind a URL, by fsspec: files put, got and listed by their names in it. Whole or not at all.

An object store puts an object in one step; where there are real files, a draft is renamed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_ray.errors import ConfigError

RENAMING = frozenset({"file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs"})
"""Protocols with real files and folders."""
DRAFT = ".draft"
TOKENS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""What tells one content of a file from the next, by the protocol."""


@dataclass(frozen=True)
class File:
    """Of a listing: bytes, and what tells this content from others."""

    size: int
    token: str


class RemoteFolder:
    """See the module. Calls raise what fsspec's implementation of the protocol raises, mostly OSError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = filesystem(self.url)
        protocol = self._fs.protocol
        self._renames = bool(RENAMING & {protocol} if isinstance(protocol, str) else RENAMING & set(protocol))

    def __str__(self) -> str:
        return self.url

    def files(self, folder: str = "") -> dict[str, File]:
        """All files below a folder of it, by name from its root; none where there is no such folder."""
        self._fs.invalidate_cache()
        start = self._path(folder) if folder else self._root
        found = self._fs.find(start, detail=True)
        names = {path[len(self._root) :].lstrip("/"): info for path, info in found.items()}
        return {
            name: File(int(info.get("size") or 0), _token(info))
            for name, info in names.items()
            if name and not name.endswith(DRAFT)
        }

    def put(self, local: Path, name: str) -> None:
        """Copy a local file there."""
        self._put(lambda path: self._fs.put_file(str(local), path), name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        self._put(lambda path: self._fs.pipe_file(path, data), name)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            self._fs.invalidate_cache()
            content: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    def get(self, name: str, local: Path) -> None:
        """Copy a file here. Raises FileNotFoundError if it is gone."""
        local.parent.mkdir(parents=True, exist_ok=True)
        draft = local.with_name(f".{local.name}{DRAFT}")
        self._fs.get_file(self._path(name), str(draft))
        draft.replace(local)

    def remove(self, names: list[str]) -> None:
        """Remove files; those that are gone already, as after a call that broke off, are none the less."""
        paths = [self._path(name) for name in names]
        try:
            if paths:
                self._fs.rm(paths)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def move(self, name: str, target: RemoteFolder) -> None:
        """Move a file into another folder of the same storage."""
        path = target._path(name)
        target._make_parent(path)
        self._fs.mv(self._path(name), path)

    def _put(self, put: Any, name: str) -> None:
        path = self._path(name)
        self._make_parent(path)
        if not self._renames:
            put(path)
            return
        put(path + DRAFT)
        self._fs.mv(path + DRAFT, path)

    def _make_parent(self, path: str) -> None:
        if self._renames:  # an object store has no folders, and would make a bucket
            self._fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises ConfigError that names what is missing."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        # Listings are asked for to learn what changed: none are kept.
        files, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(f"{url}: {error} (on every node that reaches it)") from None
    except ValueError as error:
        known = ", ".join(name for name in ("s3", "gs", "abfs", "sftp", "file") if name != protocol)
        raise ConfigError(f"{url}: {error}; give a URL of a protocol that fsspec knows, as {known}") from None
    return files, root.rstrip("/")


def _token(info: dict[str, Any]) -> str:
    return next((f"{name}={info[name]}" for name in TOKENS if info.get(name) is not None), "")
