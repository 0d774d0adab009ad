"""The media types of bodies and answers, for both sides; importable without a server."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

JSON = "application/json"
MSGPACK = "application/msgpack"
ARROW = "application/vnd.apache.arrow.stream"
PROTOBUF = "application/x-protobuf"


def plain(value: Any) -> Any:
    """Models as dicts, with what is in them left as it is."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
