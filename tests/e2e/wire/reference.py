"""vLLM's own server with the settings of the deployment: what answers have to be equal to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from lightning_ray.config import EngineSettings
from lightning_ray.net import free_port
from lightning_ray.policy.engine_arguments import engine_arguments
from lightning_ray.serving import CPU_ENGINE, QUIET

OURS = ("--worker-extension-cls", "--weight-transfer-config")
SECONDS = 120
ROOT = Path(__file__).resolve().parents[3]


class Reference:
    """What ``vllm serve`` runs, in a process of its own."""

    def __init__(self, model: Path, model_name: str, settings: EngineSettings, log: Path):
        port = free_port("127.0.0.1")
        given = engine_arguments(str(model), model_name, settings)
        for name in OURS:
            at = given.index(name)
            del given[at : at + 2]
        command = [sys.executable, "-m", "tests.e2e.wire.reference", *given]
        self.root = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                env=os.environ | QUIET | CPU_ENGINE,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.root}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"vLLM's server did not come up:\n{self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main() -> None:
    """``vllm serve``, which itself does not start where vLLM's package is named otherwise."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))


if __name__ == "__main__":
    main()
