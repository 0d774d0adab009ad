"""docs/cluster.md: what it links and names is there, and the commands in it are commands."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from lightning_ray.cli import parser
from tests.cluster_file import ROOT

TEXT = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_what_is_linked_and_named_is_there() -> None:
    for link in re.findall(r"\]\(([^)#h][^)]*)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
    for file in re.findall(r"`((?:tests|requirements|deployments)/[\w./-]+)`", TEXT):
        assert (ROOT / file).exists(), file
    for kind in re.findall(r"make setup KIND=(\w+)", TEXT):
        assert (ROOT / "requirements" / f"{kind}.txt").is_file()


@pytest.mark.parametrize("block", BLOCKS)
def test_the_shell_reads_every_block(block: str) -> None:
    done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True, timeout=10)
    assert not done.stderr


def test_our_own_commands_are_known() -> None:
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    own = [found[1] for line in lines if (found := re.match(r"(?:\w+=\S+ )?(lightning-ray [a-z]+ .*)", line))]
    assert len(own) >= 3
    for command in own:
        parser().parse_args(shlex.split(command)[1:])
