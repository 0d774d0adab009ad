"""Ports that are given once, as they may not be bound yet when the next is asked for."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_ray.net import QUIET_RANGE, RANK_RANGE, free_port

HERE = "127.0.0.1"


def test_no_port_is_given_twice_though_none_is_bound() -> None:
    with ThreadPoolExecutor(8) as pool:
        ports = [*pool.map(free_port, [HERE] * 400)]
    assert len({*ports}) == 400 and {*ports} <= {*QUIET_RANGE}


def test_ranks_have_a_range_of_their_own() -> None:
    assert free_port(HERE, RANK_RANGE) in RANK_RANGE
    assert not {*RANK_RANGE} & {*QUIET_RANGE}


def test_ports_are_given_again_when_there_are_no_others() -> None:
    few = QUIET_RANGE[-8:]
    ports = [free_port(HERE, few) for _ in range(3 * len(few))]
    assert {*ports} <= {*few}


def test_taken_ports_are_passed_over_and_named_when_all_are() -> None:
    with socket.socket() as taken:
        taken.bind((HERE, 0))
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"no free port on '127\.0\.0\.1' among 1 of {port} to {port}"):
            free_port(HERE, range(port, port + 1))
        beside = range(port - 2, port + 3)
        assert port not in [free_port(HERE, beside) for _ in range(20)]
