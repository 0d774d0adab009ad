"""What does a training run survive, and how soon does it go on? kill -9 of every one of its parts, while it trains.

    python -m benchmarks.chaos            each kill three times, the SQL example's model (about 15 minutes)
    python -m benchmarks.chaos --quick    one of each; a model of a few words (6 to 8 minutes)

One real run: vLLM, Serve with HAProxy, FSDP ranks. It begins on a Ray of its own, whose driver is killed; nothing may
stay behind. It is resumed on a cluster of simulated nodes, and goes on while its parts are killed one after the other,
the driver among them. Then its store is compared with what agents and a probe noted down, and its reward on held-out
tasks with that of a run of as many steps that nobody disturbed.

A recovery is from the kill until the role does its work again (``chaos_kills`` says when that is), the driver's from
the start of ``--resume`` until the resumed run has made a step. Figures are the worst of each kind; medians
beside them. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from psutil import Process

from benchmarks.chaos_checks import check, noise, swaps
from benchmarks.chaos_cluster import Driver, Nodes, actors, gone, train
from benchmarks.chaos_kills import KILLS
from benchmarks.chaos_train import data, make_model
from benchmarks.chaos_watch import HANG_SECONDS, Scene
from benchmarks.report import show
from benchmarks.store import Goal, bar, circumstances
from lightning_ray.run.folder import METRICS, RunFolder

GOALS = (
    Goal("recovery_s.runner", 5),
    Goal("recovery_s.store", 5),
    Goal("recovery_s.replica", 45),
    Goal("recovery_s.trainer_rank", 45),
    Goal("recovery_s.node", 30),
    Goal("recovery_s.driver", 90),
    Goal("lost_rollouts", 0),
    Goal("duplicate_rollouts", 0),
    Goal("lost_acknowledged_spans", 0),
    Goal("unproved_swaps", 0),
    Goal("hangs", 0),
)
WORKERS = 2
"""Worker nodes at first."""
FIRST_STEPS = 2
"""Made before the first kill, and after the last."""
GONE_SECONDS = 90.0
"""For what a killed driver leaves, to end by itself: Ray's agents wait for an answer of its GCS for a minute."""
FOREVER = 10_000
"""Steps, until it is known how many there are to be."""
LIMIT_SECONDS = 900.0

Tick = Callable[[str], None]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="each kill once, a smaller model")
    arguments.add_argument("--keep", type=Path, help="a folder in which everything is kept")
    given = arguments.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="lr-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stdout(sys.stderr), bar() as progress:
            line, began = progress.add_task("the model", total=None), time.monotonic()

            def tick(what: str) -> None:
                progress.update(line, advance=1, description=what)
                progress.console.print(f"{time.monotonic() - began:6.1f} s  {what}")

            figures = measure(folder, given.quick, tick)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    figures |= circumstances(given.quick)
    show("chaos", GOALS, figures)
    print(json.dumps(figures))


def measure(folder: Path, quick: bool, tick: Tick) -> dict[str, Any]:
    """Both runs, one after the other."""
    kind, repeats = ("words", 1) if quick else ("sql", 3)
    make_model(kind, folder / "model")
    disturbed = asyncio.run(Chaos(folder, kind, tick).run(repeats))
    tick("a run that nobody disturbs")
    notes, steps = notes_of(folder, "calm-notes"), disturbed["steps"]
    driver = train(folder, kind, folder / "model", notes, steps=steps, name="calm")
    try:
        wait(driver)
    finally:
        driver.stop()
    calm = json.loads((folder / "calm" / "summary.json").read_text())
    return disturbed | rewards(disturbed.pop("summary"), calm, len(data(kind)[2]))


def rewards(disturbed: dict[str, Any], calm: dict[str, Any], tasks: int) -> dict[str, Any]:
    """The held-out reward of both, sampled and greedy, and whether they differ by more than chance."""
    figures: dict[str, Any] = {}
    for mode in ("sampled", "greedy"):
        one, other = (run["test"][f"{mode}_after"] for run in (disturbed, calm))
        figures[f"final_reward.{mode}"] = round(one, 3)
        figures[f"final_reward.{mode}_undisturbed"] = round(other, 3)
        figures[f"final_reward.{mode}_before"] = round(disturbed["test"][f"{mode}_before"], 3)
        figures[f"final_reward.{mode}_within_noise"] = abs(one - other) <= noise(one, other, tasks)
    return figures


class Chaos:
    """The disturbed run."""

    def __init__(self, folder: Path, kind: str, tick: Tick):
        self.folder = folder
        self.kind = kind
        self.tick = tick
        self.run_folder = RunFolder(folder / "chaos")
        self.notes = notes_of(folder, "notes")
        self.recoveries: dict[str, list[float]] = {}
        self.others: dict[str, Any] = {"left_behind": [], "not_recovered": []}

    async def run(self, repeats: int, kills: tuple[str, ...] = tuple(KILLS), alone: bool = True) -> dict[str, Any]:
        """Begin, ``alone`` or on the cluster, kill, end, check; the figures, and the run's ``summary``."""
        left = await self._begin_alone() if alone else []
        nodes, killed = Nodes(), time.monotonic()
        driver = None
        try:
            nodes.start(WORKERS)
            scene = Scene(nodes, self.run_folder, self.notes)
            driver = self._start(FOREVER, nodes.address, resume=alone)
            await self._goes_on(scene, driver, resumed=alone)
            left_for = max(0.0, killed + GONE_SECONDS - time.monotonic())
            self.others["left_behind"] += await asyncio.to_thread(gone, left, left_for)
            for _ in range(repeats):
                for name in kills:
                    await self._strike(scene, name)
            await scene.look_at_finished()
            driver.kill()
            steps = len(scene.steps()) + FIRST_STEPS
            driver = self._start(steps, nodes.address, resume=True)
            await self._goes_on(scene, driver, resumed=True)
            scene.probe.detach()  # the store is closed with the run
            await self._left_on(scene)
            await scene.until(lambda: ended(driver), "the run has ended", LIMIT_SECONDS)
            scene.close()
        finally:
            if driver is not None:
                driver.stop()
            nodes.stop()
        return self._figures(scene, steps)

    async def _begin_alone(self) -> list[Process]:
        """The first steps, on a Ray of the run's own, whose driver is killed; all that had grown out of it."""
        self.tick("a run on its own Ray")
        driver = self._start(FOREVER)
        try:
            while not (latest := self.run_folder.latest_checkpoint()) or latest.name < f"step-{FIRST_STEPS:06d}":
                driver.check()
                await asyncio.sleep(0.2)
            self.tick("kill -9 of its driver")
            return driver.tree
        finally:
            driver.kill()

    def _start(self, steps: int, address: str | None = None, resume: bool = False) -> Driver:
        self.tick("--resume" if resume else "it starts")
        model = self.folder / "model"
        return train(self.folder, self.kind, model, self.notes, steps=steps, address=address, resume=resume)

    async def _goes_on(self, scene: Scene, driver: Driver, resumed: bool) -> None:
        """Wait until the started run has made a step; how long that took, if resumed, is entered."""
        made = self.run_folder.read_state()["step"] if resumed else 0
        metrics = self.run_folder.path / METRICS
        await scene.attach(driver)

        async def has_made_one() -> bool:
            return metrics.stat().st_mtime > driver.began and len(scene.steps()) > made

        seconds = await scene.until(has_made_one, "a started run makes a step") - driver.began
        if resumed:
            self._enter("driver", seconds)

    async def _strike(self, scene: Scene, name: str) -> None:
        """One kill, its recovery, and one step more."""
        await scene.look_at_finished()
        self.tick(f"kill -9: {name}")
        struck = await KILLS[name](scene)
        try:
            self._enter(name, await scene.until(struck.back, f"{name} is back") - struck.at)
        except TimeoutError as error:
            self._enter(name, time.time() - struck.at)
            self.others["not_recovered"].append(str(error))
        await scene.until_step(len(scene.steps()) + 1)

    async def _left_on(self, scene: Scene) -> None:
        """What the killed driver's run has left on the cluster, once there was time to end it."""
        from ray import serve

        async def is_alone() -> bool:
            return set(serve.status().applications) <= {scene.application}

        began = time.monotonic()
        try:
            await scene.until(is_alone, "the killed run's application is gone", GONE_SECONDS)
        except TimeoutError:
            self.others["left_behind"] += sorted(set(serve.status().applications) - {scene.application})
        self.others["application_gone_after_s"] = round(time.monotonic() - began, 1)
        self.others["left_behind"] += [actor.name for actor in actors("SpanStoreActor")[1:]]

    def _enter(self, name: str, seconds: float) -> None:
        self.recoveries.setdefault(name, []).append(round(seconds, 2))
        self.tick(f"{name}: {seconds:.1f} s")

    def _figures(self, scene: Scene, steps: int) -> dict[str, Any]:
        summary = json.loads((self.run_folder.path / "summary.json").read_text())
        return {
            **{f"recovery_s.{name}": max(seconds) for name, seconds in self.recoveries.items()},
            **{f"recovery_s_median.{name}": median(seconds) for name, seconds in self.recoveries.items()},
            **{f"kills.{name}": len(seconds) for name, seconds in self.recoveries.items()},
            **check(self.run_folder, self.notes, scene.finished, scene.probe.acknowledged),
            **swaps(summary),
            "hangs": int(scene.longest_pause > HANG_SECONDS),
            "longest_pause_s": round(scene.longest_pause, 1),
            "trainer_restarts": summary["trainer_restarts"],
            "steps": steps,
            "summary": summary,
            **self.others,
        }


def notes_of(folder: Path, name: str) -> Path:
    """A folder for what agents note down."""
    notes = folder / name
    notes.mkdir(exist_ok=True)
    return notes


def wait(driver: Driver) -> None:
    """Until it has ended. Raises TimeoutError."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not driver.has_ended:
        if time.monotonic() > deadline:
            raise TimeoutError(f"a run has not ended after {LIMIT_SECONDS:.0f} s")
        time.sleep(0.5)


async def ended(driver: Driver) -> bool:
    """Whether it has."""
    return driver.has_ended


if __name__ == "__main__":
    main()
