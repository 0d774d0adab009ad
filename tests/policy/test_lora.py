"""LoRA: only the adapter trains, whole weights have it merged, and PEFT reads the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("verl")

from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import check_model_folder
from tests.policy import formulas as by_hand
from tests.policy.oracle import load, token_logprobs
from tests.policy.ranks import Ranks, assert_same_weights, settings_for

LORA = {"rank": 4, "alpha": 16.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
REFERENCE = {"coefficient": 0.2, "estimator": "k3"}


def settings(folder: Path, **changes: Any) -> Any:
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "minibatch_rollouts": 1000, "lora": LORA, "warmup_steps": 0}
    return settings_for(folder, **defaults | changes)


def with_adapter(folder: Path, adapter: dict[str, np.ndarray]) -> Any:
    """PEFT's own model, with these adapter weights."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=16, target_modules=LORA["target_modules"], task_type="CAUSAL_LM")
    model = get_peft_model(load(folder), config)
    set_peft_model_state_dict(model, {name: torch.from_numpy(tensor) for name, tensor in adapter.items()})
    return model


def test_only_the_adapter_trains_and_merged_weights_are_the_policy(
    ranks: Ranks, folder: Path, batches: list[pa.Table]
) -> None:
    base = {name: weight.detach().numpy() for name, weight in load(folder).named_parameters()}
    ranks.build(settings(folder), 2)
    before = ranks.adapter()
    assert_same_weights(ranks.weights(), base, atol=0)  # B is 0 at first
    for table in batches[:2]:
        ranks.call("update", table)
    after, merged = ranks.adapter(), ranks.weights()
    assert all(np.abs(after[name] - before[name]).max() > 1e-3 for name in before)
    assert {name.rsplit(".", 2)[1] for name in before} == {"lora_A", "lora_B"}
    assert all(".lora_" in name for name in ranks.trained())
    changed = {name for name in base if np.abs(merged[name] - base[name]).max() > 0}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}

    whole = load(folder)
    whole.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in merged.items()}, strict=False)
    sequences = batches[0]["token_ids"].to_pylist()[:4]
    peft = with_adapter(folder, after)
    for ours, sequence in zip(ranks.call("logprobs", sequences), sequences, strict=True):
        np.testing.assert_allclose(token_logprobs(whole, sequence).detach().numpy(), ours, atol=1e-5)
        np.testing.assert_allclose(token_logprobs(peft, sequence).detach().numpy(), ours, atol=1e-5)


def test_one_rank_two_ranks_and_plain_pytorch_agree_with_a_reference_too(
    ranks: Ranks, folder: Path, batches: list[pa.Table]
) -> None:
    """The reference is the base without its adapter."""
    results, adapters = [], []
    for world_size, tokens in ((1, 2048), (2, 100)):
        ranks.build(settings(folder, reference=REFERENCE, micro_batch_tokens=tokens), world_size)
        begun = ranks.adapter()
        results.append([ranks.call("update", table) for table in batches[:3]])
        adapters.append(ranks.adapter())
    for one, two in zip(*results, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert_same_weights(*adapters, atol=1e-5)

    model, base = with_adapter(folder, begun), load(folder)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    chosen = settings(folder)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=chosen.betas, weight_decay=chosen.weight_decay)
    clip = by_hand.clipped(chosen.clip_low, chosen.clip_high)
    for table, result in zip(batches[:3], results[0], strict=True):
        rows = by_hand.rows_of(table, model, base)
        advantages = by_hand.spread(rows, by_hand.group_relative(table, True))
        losses = [clip(row, advantage) + 0.2 * by_hand.k3(row) for row, advantage in zip(rows, advantages, strict=True)]
        loss = by_hand.mean_over_tokens(rows, losses)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, chosen.gradient_clip)
        optimizer.step()
        assert result["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert result["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    plain = {
        name.replace(".default.", "."): weight.detach().numpy()
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
    assert_same_weights(plain, adapters[0], atol=1e-5)


@pytest.mark.parametrize("lora", [LORA, {}], ids=["adapter", "whole"])
def test_three_updates_and_three_after_a_resume_are_six(
    ranks: Ranks, folder: Path, batches: list[pa.Table], tmp_path: Path, lora: dict[str, Any]
) -> None:
    chosen = settings(
        folder, lora=lora, reference=REFERENCE, minibatch_rollouts=5, schedule="cosine", schedule_steps=24
    )
    saved = tmp_path / "saved"
    ranks.build(chosen, 2)
    for table in batches[:2]:
        ranks.call("update", table)
    ranks.call("save", str(saved))
    expected = [ranks.call("update", table) for table in batches[2:]]
    weights = ranks.weights()
    ranks.build(chosen, 2)
    ranks.call("load", str(saved))
    assert [ranks.call("update", table) for table in batches[2:]] == expected
    assert_same_weights(ranks.weights(), weights, atol=0)


def test_peft_reads_a_checkpoint_that_holds_the_adapter_alone(
    ranks: Ranks, folder: Path, batches: list[pa.Table], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    ranks.build(settings(folder), 2)
    ranks.call("update", batches[0])
    ranks.call("save", str(tmp_path))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sequence = batches[0]["token_ids"][0].as_py()
    ours = ranks.call("logprobs", [sequence])[0]
    np.testing.assert_allclose(token_logprobs(model, sequence).detach().numpy(), ours, atol=1e-5)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    states = [torch.load(file, weights_only=False) for file in (tmp_path / "trainer_state").glob("model_*.pt")]
    assert len(states) == 2 and all(".lora_" in name for state in states for name in state)
    with pytest.raises(ConfigError, match="holds a LoRA adapter and not a whole model"):
        check_model_folder(str(tmp_path))
    ranks.build(settings(folder, lora={}), 2)
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter, and lora\.rank=0 trains whole weights"):
        ranks.call("load", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"lora\.rank=4, and 8 is to be trained"),
        ({"target_modules": ["q_proj"]}, r"lora\.target_modules=\['down_proj', 'q_proj', 'v_proj'\], and \['q_proj'\]"),
    ],
    ids=["rank", "modules"],
)
def test_another_adapter_is_refused(
    ranks: Ranks, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    ranks.build(settings(folder))
    ranks.call("save", str(tmp_path))
    ranks.build(settings(folder, lora=LORA | {"alpha": 8.0}))
    ranks.call("load", str(tmp_path))
    ranks.build(settings(folder, lora=LORA | changes))
    with pytest.raises(ConfigError, match=message):
        ranks.call("load", str(tmp_path))


def test_another_model_is_refused(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    ranks.build(settings(folder, lora={}))
    ranks.call("save", str(tmp_path))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_version": "0"}))
    ranks.call("load", str(tmp_path))
    file.write_text(json.dumps(config | {"num_hidden_layers": 28}))
    with pytest.raises(ConfigError, match=r"holds another model than .*: num_hidden_layers 28 there, 2 here"):
        ranks.call("load", str(tmp_path))


def test_another_tokenizer_is_refused(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    ranks.build(settings(folder, lora={}))
    ranks.call("save", str(saved))
    kept = (saved / "tokenizer.json").read_bytes()
    (saved / "tokenizer.json").write_text('{"another": "tokenizer"}')
    with pytest.raises(ConfigError, match=r"holds another tokenizer \(sha256 [0-9a-f]{12}\) than the model"):
        ranks.call("load", str(saved))
    (saved / "tokenizer.json").write_bytes(kept)
    ranks.call("load", str(saved))
    progress = json.loads((saved / "trainer_state" / "progress.json").read_text())
    (saved / "trainer_state" / "progress.json").write_text(json.dumps(progress | {"tokenizer": "0" * 64}))
    with pytest.raises(ConfigError, match="was trained with another tokenizer"):
        ranks.call("load", str(saved))
