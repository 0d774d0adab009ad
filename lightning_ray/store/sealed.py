"""Files that are written once and whole: a header that says what they are, and one checksummed content.

Read back they are as they were written, or an error names them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_ray.errors import StoreError
from lightning_ray.store import frames
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.schema import SCHEMA_VERSION


def write_sealed(path: Path, what: str, content: Any) -> None:
    """Write a file of plain data (as ``packing`` has it) and sync it; ``what`` names the kind of file."""
    head = pack({"format": what, "version": SCHEMA_VERSION}, what)
    with path.open("wb") as file:
        for kind, data in ((frames.FILE_HEADER, head), (frames.ENTRY, pack(content, what))):
            for buffer in frames.pack_frame(kind, 0, data, None)[0]:
                file.write(buffer)
        file.flush()
        os.fsync(file.fileno())


def read_sealed(path: Path, what: str) -> Any:
    """The content of a file of ``write_sealed``. Raises StoreError if it is damaged or of another version, and
    FileNotFoundError.
    """
    data = memoryview(path.read_bytes())
    found = list(frames.frames(data))
    if len(found) != 2 or found[-1].end != len(data):
        raise StoreError(f"{path}: the file is damaged; restore it from a copy")
    header = unpack(found[0].head)
    if header.get("format") != what or header.get("version") != SCHEMA_VERSION:
        raise StoreError(
            f"{path} is a {header.get('format')!r} of version {header.get('version')}; this lightning-ray reads "
            f"{what!r} of version {SCHEMA_VERSION}"
        )
    return unpack(found[1].head)


def sync_folder(folder: Path) -> None:
    """Make the creation, renaming and removal of a folder's files durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
