"""A policy on disk: a folder in Hugging Face format, with the state of its training beside the weights.

Layout: config.json, tokenizer files and safetensors as any tool reads them; ``trainer_state/`` with files of
each rank. Writing into a temporary folder and renaming it is the caller's business.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from lightning_ray.errors import ConfigError

STATE = "trainer_state"
PROGRESS = "progress.json"
WEIGHTS = ("*.safetensors", "*.bin")
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template*",
)
"""Files that decide which token ids a text or conversation becomes."""
NOT_OF_THE_MODEL = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""What config.json tells of a file rather than of the model."""


def check_model_folder(path: str, setting: str = "model_path") -> Path:
    """The folder, if it holds a model. Raises ConfigError that says what is missing and what to do."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{setting}={path!r} is not a folder. Give a local one in Hugging Face format; a model of the "
            "hub is fetched with: hf download <owner>/<name> --local-dir <folder>"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting}={path!r} has no config.json: give what save_pretrained wrote")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ConfigError(
            f"{setting}={path!r} has a config.json but no weights ({' or '.join(WEIGHTS)}): "
            "download it whole, or save the model with save_pretrained"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        base = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
        raise ConfigError(
            f"{setting}={path!r} holds a LoRA adapter and not a whole model: give its base ({base!r}) and resume from "
            "the folder, or merge the two with PEFT's merge_and_unload and save_pretrained"
        )
    return folder


def matrix_names(folder: Path) -> set[str]:
    """The modules with a matrix, by the last part of their names: ``q_proj``, ``embed_tokens``, ...; of safetensors."""
    names = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        names |= {name.split(".")[-2] for name, tensor in header.items() if len(tensor.get("shape", ())) == 2}
    return names


def vocabulary_of(folder: Path) -> int:
    """How many tokens the model of a folder knows; of one with several parts, its text part."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over names and bytes of the files that make the folder's tokenizer; the same for none."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in TOKENIZER for file in folder.glob(pattern) if file.is_file()}):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def check_tokenizer(checkpoint: Path, model: Path) -> None:
    """Raise ConfigError if the checkpoint was trained, or now comes, with another tokenizer than the model's."""
    expected = tokenizer_hash(model)
    noted = json.loads((checkpoint / STATE / PROGRESS).read_text()).get("tokenizer", expected)
    for what, found in (("was trained with", noted), ("holds", tokenizer_hash(checkpoint))):
        if found != expected:
            raise ConfigError(
                f"{checkpoint} {what} another tokenizer (sha256 {found[:12]}) than the model {model} has "
                f"({expected[:12]}): its weights would read other words. Resume with the model it began from, or put "
                "its tokenizer's files back"
            )


def check_same_model(checkpoint: Path, model: Path) -> None:
    """Raise ConfigError if the checkpoint is of another model than the one given, by their config.json."""
    held, given = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, model))
    differing = [
        f"{name} {held.get(name)!r} there, {given.get(name)!r} here"
        for name in sorted((held.keys() | given.keys()) - NOT_OF_THE_MODEL)
        if held.get(name) != given.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{checkpoint} holds another model than {model}: {', '.join(differing[:3])}. Resume with the model it "
            "began from, or begin anew"
        )


def copy_description(source: Path, target: Path) -> None:
    """Copy what describes the model and its tokenizer, unchanged: every file but weights and their index."""
    for file in source.iterdir():
        weights = any(file.match(pattern) for pattern in (*WEIGHTS, "*.index.json"))
        if file.is_file() and not weights:
            shutil.copyfile(file, target / file.name)


def write_progress(state: Path, updates: int, world_size: int) -> None:
    """Note how far the training is, for how many ranks its state was written, and the tokenizer in the folder above."""
    progress = {"updates": updates, "world_size": world_size, "tokenizer": tokenizer_hash(state.parent)}
    (state / PROGRESS).write_text(json.dumps(progress))


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
