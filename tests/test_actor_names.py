"""What a run's actors and applications are called."""

from __future__ import annotations

import pytest

from actors.names import shown_name
from lightning_ray.cluster import Cluster, plain_name


@pytest.mark.parametrize(
    ("run", "plain"),
    [
        ("sql", "sql"),
        ("sql_2.1-b", "sql_2.1-b"),
        ("my run/7", "my-run-7"),
        ("größe", "gr-e"),
        ("..", "run"),
        ("", "run"),
    ],
)
def test_a_run_s_name_is_fit_for_an_address(run: str, plain: str) -> None:
    assert plain_name(run) == plain
    one, other = Cluster(run=run), Cluster(run=run)
    assert one._name.startswith(f"{plain}-") and one._name != other._name, "two runs of one name share a Ray"


def test_outside_of_an_actor_it_is_the_class_s() -> None:
    class Thing:
        def __repr__(self) -> str:
            return shown_name(self)

    assert repr(Thing()) == "Thing"
