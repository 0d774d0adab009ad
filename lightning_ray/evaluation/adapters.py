"""A LoRA checkpoint as a model of its own, for who serves it without its trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lightning_ray.errors import ConfigError
from lightning_ray.policy.loaded import CANARIES
from lightning_ray.policy.model_folder import ADAPTER_CONFIG, STATE, check_model_folder, copy_description


def merge_adapter(checkpoint: Path, target: Path) -> None:
    """Write into ``target`` the base model with the checkpoint's adapter merged into its weights (float32), its
    tokenizer, and what proves them. Raises ConfigError if the base is not where it was.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    named = json.loads((checkpoint / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise ConfigError(f"{checkpoint} is a LoRA adapter of {named!r}, which is no folder: put its base back there")
    base = check_model_folder(str(named), "the adapter's base")
    logging.disable_progress_bar()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), str(checkpoint))
    model.merge_and_unload().save_pretrained(target)
    copy_description(base, target)
    if (checkpoint / STATE / CANARIES).is_file():
        (target / STATE).mkdir(exist_ok=True)
        shutil.copyfile(checkpoint / STATE / CANARIES, target / STATE / CANARIES)
