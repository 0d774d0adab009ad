"""A LoRA checkpoint, merged into its base, computes what the two compute together."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_ray as lr
from lightning_ray.evaluation.adapters import merge_adapter
from lightning_ray.policy.loaded import loaded_from, write_canaries
from lightning_ray.policy.model_folder import STATE, check_model_folder
from tests.e2e.tiny import make_tiny_model


def test_a_merged_adapter_is_the_two_together(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(tmp_path / "base")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / STATE).mkdir()
    write_canaries(tmp_path / "adapter", [[1, 2]], [[-1.5]])
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        expected = tuned(ids).logits

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    check_model_folder(str(tmp_path / "merged"))
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded_from(tmp_path / "merged", 3, 1e-4).expected == ((-1.5,),)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(lr.ConfigError, match="put its base back there"):
        merge_adapter(tmp_path / "adapter", tmp_path / "again")
