"""A checkpoint of the policy: a folder that other tools read, with what training needs to go on in ``trainer_state``.

With LoRA the folder holds the adapter alone, as PEFT writes it; its base is the initial model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import (
    ADAPTER_CONFIG,
    STATE,
    check_same_model,
    check_tokenizer,
    copy_description,
    read_progress,
    write_progress,
)
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.verl_backend.engine import PaddedEngine
from lightning_ray.policy.verl_backend.export import adapter_weights, whole_weights

PEFT_WEIGHTS = "adapter_model{suffix}.safetensors"


def save(engine: PaddedEngine, settings: UpdateSettings, folder: str, updates: int) -> None:
    """Write weights, tokenizer, optimizer, schedule and random state into the folder; collective.

    Without LoRA the folder serves as another run's ``model_path`` too.
    """
    from huggingface_hub import save_torch_state_dict

    target = Path(folder)
    (target / STATE).mkdir(parents=True, exist_ok=True)
    lora = settings.lora.rank > 0
    weights = _on_rank_zero(adapter_weights(engine) if lora else whole_weights(engine))
    if dist.get_rank() == 0:
        copy_description(Path(settings.model_path), target)
        if lora:
            save_torch_state_dict(weights, target, filename_pattern=PEFT_WEIGHTS)
            (target / ADAPTER_CONFIG).write_text(json.dumps(_adapter_config(engine, settings), indent=2))
        else:
            save_torch_state_dict(weights, target)
        write_progress(target / STATE, updates, dist.get_world_size())
    engine.save_checkpoint(str(target / STATE))


def load(engine: PaddedEngine, settings: UpdateSettings, folder: str) -> int:
    """Go on where ``save`` wrote the folder, bit for bit; collective. Returns the updates made by then.

    The optimizer keeps its moments, the schedule its place; rate, betas, decay and the schedule's shape are those of
    the settings, which may have changed.

    Raises ConfigError if the folder holds no such state, that of another number of ranks, another model or tokenizer,
    another adapter, or an adapter where whole weights are trained, or the other way round.
    """
    updates = read_progress(Path(folder), dist.get_world_size())
    check_same_model(Path(folder), Path(settings.model_path))
    check_tokenizer(Path(folder), Path(settings.model_path))
    _check_adapter(engine, settings, folder)
    engine.load_checkpoint(str(Path(folder) / STATE), del_local_after_load=False)
    engine.follow_settings()
    return updates


def _check_adapter(engine: PaddedEngine, settings: UpdateSettings, folder: str) -> None:
    file = Path(folder) / ADAPTER_CONFIG
    adapter = file.is_file()
    if adapter != (settings.lora.rank > 0):
        held, trained = ("a LoRA adapter", "whole weights") if adapter else ("whole weights", "a LoRA adapter")
        raise ConfigError(
            f"{folder} holds {held}, and lora.rank={settings.lora.rank} trains {trained}: resume with the settings it "
            "was saved under, or begin anew"
        )
    if adapter:
        held, own = json.loads(file.read_text()), _adapter_config(engine, settings)
        for name, setting in (("r", "rank"), ("target_modules", "target_modules")):
            if held[name] != own[name]:
                raise ConfigError(
                    f"{folder} holds an adapter with lora.{setting}={held[name]!r}, and {own[name]!r} is to be "
                    "trained: resume with the settings it was saved under, or begin anew"
                )


def _on_rank_zero(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous and on the CPU, on rank 0; nothing on the others, which take part in gathering them."""
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if dist.get_rank() == 0:
            full = tensor.detach().cpu().contiguous()
            # Uneven shards are gathered into a longer buffer, which the file must not hold.
            covers = full.untyped_storage().nbytes() == full.nbytes
            kept[name] = full if covers else full.clone()
    return kept


def _adapter_config(engine: PaddedEngine, settings: UpdateSettings) -> dict[str, Any]:
    config = engine.module.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": settings.model_path, "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
