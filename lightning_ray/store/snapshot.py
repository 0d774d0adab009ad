"""The state as plain bytes: rollouts that have ended one by one, all else as one snapshot.

A rollout that has ended hardly changes any more, so ``Rollouts`` keeps it packed, a few hundred bytes each, and
unpacks it when it is asked for. Unpacking trusts what was packed: it checks no types.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, TypeVar, cast

import msgpack
from pydantic import BaseModel

from lightning_ray.store.log import Event
from lightning_ray.store.packing import pack
from lightning_ray.store.state import Live, RolloutEntry, RunState
from lightning_ray.types import TERMINAL_ROLLOUT, Attempt, ResourcesUpdate, Rollout, RolloutConfig, Worker

SNAPSHOT = "lightning-ray state"
"""What files of snapshots are called inside."""

M = TypeVar("M", bound=BaseModel)
_UNPACKED_ROLLOUTS = 2048
_NONE: Any = object()


def pack_entry(entry: RolloutEntry) -> bytes:
    """A rollout with its attempts and counters."""
    rollout = _given(entry.rollout)
    config = _given(rollout.pop("config"))
    counters = (entry.serial, entry.sequence, entry.counted, entry.infrastructure)
    packed = (counters, rollout, config, [_given(attempt) for attempt in entry.attempts])
    return pack(packed, f"rollout {entry.rollout.rollout_id}")


def unpack_entry(data: bytes) -> RolloutEntry:
    """The entry of ``pack_entry``."""
    (serial, sequence, counted, infrastructure), rollout, config, attempts = _unpack(data)
    rollout["config"] = _construct(RolloutConfig, config)
    return RolloutEntry(
        _construct(Rollout, rollout),
        serial,
        [_construct(Attempt, attempt) for attempt in attempts],
        sequence,
        counted,
        infrastructure,
    )


class Rollouts(dict[str, RolloutEntry]):
    """Rollouts by id, in order of creation; those that have ended are packed but for the last in use.

    An entry of a rollout that has ended is to be changed at once after it was looked up by its id; what
    ``values`` and ``items`` give of them is for reading.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unpacked: OrderedDict[str, None] = OrderedDict()

    def settle(self, rollout_id: str) -> None:
        """Note that a rollout has ended."""
        self._unpacked[rollout_id] = None
        while len(self._unpacked) > _UNPACKED_ROLLOUTS:
            oldest, _ = self._unpacked.popitem(last=False)
            super().__setitem__(oldest, cast(RolloutEntry, pack_entry(super().__getitem__(oldest))))

    def put_packed(self, rollout_id: str, data: bytes) -> None:
        """Add a rollout that has ended as ``pack_entry`` gave it."""
        super().__setitem__(rollout_id, cast(RolloutEntry, data))

    def order(self, serials: dict[str, int]) -> None:
        """Put the rollouts in order of creation; ``serials`` has those of the packed ones."""
        entries: list[tuple[str, Any]] = list(super().items())
        entries.sort(key=lambda item: item[1].serial if type(item[1]) is RolloutEntry else serials[item[0]])
        super().clear()
        super().update(entries)

    def __getitem__(self, rollout_id: str) -> RolloutEntry:
        entry: Any = super().__getitem__(rollout_id)
        if type(entry) is bytes:
            entry = unpack_entry(entry)
            super().__setitem__(rollout_id, entry)
            self.settle(rollout_id)
        return cast(RolloutEntry, entry)

    def get(self, rollout_id: str, default: Any = None) -> Any:
        if rollout_id not in self:
            return default
        return self[rollout_id]

    def pop(self, rollout_id: str, default: Any = _NONE) -> Any:
        if default is not _NONE and rollout_id not in self:
            return default
        entry = self[rollout_id]
        self._unpacked.pop(rollout_id, None)
        super().pop(rollout_id)
        return entry

    def values(self) -> Any:
        return _Iterated(len(self), self._entries)

    def items(self) -> Any:
        return _Iterated(len(self), lambda: zip(self, self._entries(), strict=True))

    def _entries(self) -> Iterator[RolloutEntry]:
        for entry in super().values():
            yield unpack_entry(entry) if type(entry) is bytes else entry  # type: ignore[unreachable]


class _Iterated:
    """A collection that is made anew at each iteration."""

    def __init__(self, length: int, make: Any) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def pack_state(state: RunState) -> dict[str, Any]:
    """All of the state but the rollouts that have ended, as plain data."""
    return {
        "rollouts": [pack_entry(entry) for entry in state.rollouts.values() if not _ended(entry)],
        "live": [(rollout_id, live.last_seen, live.leased) for rollout_id, live in state.live.items()],
        "by_worker": [(worker_id, list(held.items())) for worker_id, held in state.by_worker.items()],
        "queue": list(state.queue),
        "requests": list(state.requests.items()),
        "resources": [update.model_dump(mode="json") for update in state.resources.values()],
        "latest_resources_id": state.latest_resources_id,
        "workers": [_given(worker) for worker in state.workers.values()],
        "serial": state.serial,
    }


def unpack_state(content: dict[str, Any], state: RunState) -> None:
    """Add the snapshot of ``pack_state`` to a state that has at most rollouts that have ended."""
    for data in content["rollouts"]:
        entry = unpack_entry(data)
        state.rollouts[entry.rollout.rollout_id] = entry
        state.statuses[entry.rollout.status] += 1
        state.attempts += len(entry.attempts)
    for rollout_id, last_seen, leased in content["live"]:
        state.live[rollout_id] = Live(state.rollouts[rollout_id].attempts[-1], last_seen, leased)
    for worker_id, held in content["by_worker"]:
        state.by_worker[worker_id] = dict(held)
    state.queue.update(dict.fromkeys(content["queue"]))
    for request_id, claims in content["requests"]:
        state.requests[request_id] = [(rollout_id, attempt_id) for rollout_id, attempt_id in claims]
    for update in content["resources"]:
        state.resources[update["resources_id"]] = ResourcesUpdate.model_validate(update)
    state.latest_resources_id = content["latest_resources_id"]
    for worker in content["workers"]:
        state.workers[worker["worker_id"]] = _construct(Worker, worker)
    state.serial = content["serial"]


def ended_entries(state: RunState) -> list[RolloutEntry]:
    """The rollouts that have ended."""
    return [entry for entry in state.rollouts.values() if _ended(entry)]


def split(event: Event, known: Collection[str]) -> tuple[Event | None, Event | None]:
    """The part of an event that concerns rollouts in ``known``, and the part that concerns others.

    Deletions concern both.
    """
    kind = event["kind"]
    if kind == "spans":
        mine: Any = [run for run in event["runs"] if run[0] in known]
        if len(mine) == len(event["runs"]):
            return event, None
        return _with(event, "runs", mine), _with(event, "runs", [run for run in event["runs"] if run[0] not in known])
    if kind == "sequences":
        last = event["last"]
        mine = {rollout_id: number for rollout_id, number in last.items() if rollout_id in known}
        others = {rollout_id: number for rollout_id, number in last.items() if rollout_id not in known}
        return _with(event, "last", mine), _with(event, "last", others)
    if kind == "deleted":
        mine = [rollout_id for rollout_id in event["rollout_ids"] if rollout_id in known]
        return _with(event, "rollout_ids", mine), event
    if kind in ("updated", "attempt_updated") and event["rollout_id"] not in known:
        return None, event
    return event, None


def _with(event: Event, name: str, value: Any) -> Event | None:
    return {**event, name: value} if value else None


def _ended(entry: RolloutEntry) -> bool:
    return entry.rollout.status in TERMINAL_ROLLOUT


def _given(model: BaseModel) -> dict[str, Any]:
    return {name: value for name, value in model.__dict__.items() if value is not None}


@cache
def _blank(model: type[BaseModel]) -> dict[str, None]:
    return dict.fromkeys(model.model_fields)


def _construct(model: type[M], fields: dict[str, Any]) -> M:
    """As ``model_construct`` for fields that ``_given`` gave, several times as fast: all others are None."""
    made = model.__new__(model)
    object.__setattr__(made, "__dict__", {**_blank(model), **fields})
    object.__setattr__(made, "__pydantic_fields_set__", set(fields))
    object.__setattr__(made, "__pydantic_extra__", None)
    object.__setattr__(made, "__pydantic_private__", None)
    return made


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)
