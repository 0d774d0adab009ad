"""What callers may change of a rollout and of an attempt: their arguments checked and made plain.

Pure: refuses with a StoreError that names the field and its value, before anything is decided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lightning_ray.errors import StoreError
from lightning_ray.store.packing import pack, unpack
from lightning_ray.types import AttemptStatus, Rollout, RolloutStatus

_ROLLOUT_FIELDS = frozenset({"input", "mode", "resources_id", "status", "config", "metadata"})
_ATTEMPT_FIELDS = frozenset({"status", "worker_id", "last_heartbeat_time", "metadata"})


def plain(value: Any, what: str) -> Any:
    """The value as it comes back from the log; StoreError naming ``what`` if it cannot be stored."""
    return unpack(pack(value, what))


def rollout_changes(
    rollout: Rollout, changes: Mapping[str, Any], resources: Collection[str]
) -> tuple[dict[str, Any], RolloutStatus | None]:
    """The fields to change, as the log holds them, and the status to set, if any."""
    what = f"update_rollout of {rollout.rollout_id}"
    _check_names(what, changes, _ROLLOUT_FIELDS)
    fields = dict(changes)
    status = _status(what, fields.pop("status", None), RolloutStatus)
    if fields.get("resources_id") is not None and fields["resources_id"] not in resources:
        raise StoreError(
            f"{what} names resources {fields['resources_id']!r}, which the store does not have; publish them with "
            "update_resources first"
        )
    if "config" in fields:
        config = fields["config"]
        fields["config"] = config.model_dump() if isinstance(config, BaseModel) else config or {}
    fields = plain(fields, f"the input or metadata of rollout {rollout.rollout_id}")
    try:
        Rollout.model_validate({**dict(rollout), **fields})
    except ValidationError as error:
        raise StoreError(f"{what}: {_first(error)}") from None
    return fields, status


def attempt_changes(what: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to change, as the log holds them."""
    _check_names(what, changes, _ATTEMPT_FIELDS)
    fields = plain(dict(changes), f"{what}: its metadata")
    if "status" in fields:
        _status(what, fields["status"], AttemptStatus)
    for name, kind in (("worker_id", str), ("last_heartbeat_time", int | float), ("metadata", dict)):
        value = fields.get(name)
        if value is not None and not isinstance(value, kind):
            raise StoreError(f"{what}: {name} is {value!r}; it must be a {getattr(kind, '__name__', 'number')} or None")
    return fields


def _check_names(what: str, changes: Mapping[str, Any], fields: frozenset[str]) -> None:
    unknown = sorted(changes.keys() - fields)
    if unknown:
        raise StoreError(f"{what} got {unknown}, which cannot be changed; it changes {sorted(fields)}")


def _status(what: str, status: Any, kind: Any) -> Any:
    if status is not None and status not in get_args(kind):
        raise StoreError(f"{what} got status {status!r}; it must be one of {list(get_args(kind))}")
    return status


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, found['loc']))} is {found['input']!r}: {found['msg']}"
