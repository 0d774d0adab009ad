"""A policy on disk: a folder in Hugging Face format, with the state of its training beside the weights.

Layout: config.json, tokenizer files and safetensors as any tool reads them; ``trainer_state/`` with files of
each rank. Writing into a temporary folder and renaming it is the caller's business.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lightning_ray.errors import ConfigError

STATE = "trainer_state"
PROGRESS = "progress.json"
WEIGHTS = ("*.safetensors", "*.bin")


def check_model_folder(path: str) -> Path:
    """The folder, if it holds a model. Raises ConfigError that says what is missing and what to do."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"model_path={path!r} is not a folder. Give a local one in Hugging Face format; a model of the "
            "hub is fetched with: hf download <owner>/<name> --local-dir <folder>"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model_path={path!r} has no config.json: give what save_pretrained wrote")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ConfigError(
            f"model_path={path!r} has a config.json but no weights ({' or '.join(WEIGHTS)}): "
            "download it whole, or save the model with save_pretrained"
        )
    return folder


def copy_description(source: Path, target: Path) -> None:
    """Copy what describes the model and its tokenizer, unchanged: every file but weights and their index."""
    for file in source.iterdir():
        weights = any(file.match(pattern) for pattern in (*WEIGHTS, "*.index.json"))
        if file.is_file() and not weights:
            shutil.copyfile(file, target / file.name)


def write_progress(state: Path, updates: int, world_size: int) -> None:
    """Note how far the training is, and for how many ranks its state was written."""
    (state / PROGRESS).write_text(json.dumps({"updates": updates, "world_size": world_size}))


def read_progress(folder: Path, world_size: int) -> int:
    """Updates made when the folder was saved.

    Raises ConfigError if the folder has no state of training, or state for another number of ranks.
    """
    file = folder / STATE / PROGRESS
    if not file.is_file():
        raise ConfigError(f"{folder} has no {STATE}/{PROGRESS}: it is no checkpoint to resume from")
    progress = json.loads(file.read_text())
    saved_by = progress["world_size"]
    if saved_by != world_size:
        raise ConfigError(
            f"{folder} was saved by {saved_by} trainer ranks and cannot be resumed by {world_size}: "
            f"start {saved_by} ranks, or begin anew with model_path={str(folder)!r}"
        )
    return int(progress["updates"])
