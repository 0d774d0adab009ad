"""The house: a light import, and arrows that point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("ray", "torch", "vllm", "verl", "transformers")
AGENT = """
import lightning_ray as lr
from openai import AsyncOpenAI

@lr.rollout
async def agent(task: dict, llm: lr.LLM) -> float:
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    lr.emit_reward(1.0)
    return 1.0

lr.Trainer(algorithm=lr.GRPO(model="somewhere", group_size=8), n_runners=2)
"""
SITE = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
BLOCK = f"import sys\nfor name in {HEAVY!r}:\n    sys.modules[name] = None\n"


def test_an_agent_and_its_trainer_need_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK + AGENT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_import_is_light() -> None:
    """Of other packages it imports pydantic alone, and so takes some 0.2 s of CPU."""
    asked = "import sys; import lightning_ray; print(*{name.partition('.')[0] for name in sys.modules})"
    told = subprocess.run([sys.executable, "-S", "-c", SITE + asked], capture_output=True, text=True, timeout=60)
    others = set(told.stdout.split()) - sys.stdlib_module_names - {"__main__", "lightning_ray"}
    ours = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert told.returncode == 0 and {name for name in others if not name.startswith("_")} <= ours, told


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_library_looks_at_actors_and_deployments_through_one_door() -> None:
    for file in (ROOT / "lightning_ray").rglob("*.py"):
        inward = {name for name in imports_of(file) if name.split(".")[0] in ("actors", "deployments")}
        assert not inward or file.name == "cluster.py", f"{file.relative_to(ROOT)} imports {inward}"


@pytest.mark.parametrize("part", ["store", "capture", "policy"])
def test_the_parts_of_the_library_do_not_know_each_other(part: str) -> None:
    others = {f"lightning_ray.{name}" for name in ("store", "capture", "trajectories", "policy") if name != part}
    for file in (ROOT / "lightning_ray" / part).rglob("*.py"):
        known = {name for name in imports_of(file) if name.startswith(tuple(others))}
        assert not known, f"{file.relative_to(ROOT)} imports {known}"
