"""The policy's model, optimizer and schedule: verl's FSDP2 engine, on padded rows.

Rows are padded on the right and no attention mask is given: in a causal model no token sees what follows it,
so the padding changes nothing, and attention takes its fast causal path. The same class runs on CPU and CUDA.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging as transformers_logging
from verl.trainer.config import CheckpointConfig
from verl.utils.device import get_device_name, get_nccl_backend
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.config.optimizer import build_optimizer

from lightning_ray.errors import ConfigError
from lightning_ray.policy.schedule import rate_share
from lightning_ray.policy.settings import UpdateSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # one for each engine that is not installed
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

BACKEND = "lightning-ray"
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}
MODEL: dict[str, Any] = {
    "load_tokenizer": False,
    "use_remove_padding": False,
    "override_config": {"attn_implementation": "sdpa"},
}


@EngineRegistry.register(model_type="language_model", backend=BACKEND, device=["cpu", "cuda"])
class PaddedEngine(FSDPEngineWithLMHead):
    """verl's engine with its own view of a micro batch.

    A micro batch has ``token_ids`` (B, T) and ``wanted`` (B, T - 1), which belongs to the tokens after the
    first: True where the log probability is to be computed. The output has ``log_probs`` and ``entropy``,
    (B, T - 1) float32, 0 where not wanted.
    """

    settings: UpdateSettings
    """Set before ``initialize``."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"input_ids": micro_batch["token_ids"]}, {}

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        wanted = micro_batch["wanted"]
        scores = output.logits[:, :-1][wanted].float().log_softmax(-1)
        sampled = scores.gather(-1, micro_batch["token_ids"][:, 1:][wanted].unsqueeze(-1)).squeeze(-1)
        with contextlib.nullcontext() if self.settings.entropy_bonus else torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
        zeros = torch.zeros(wanted.shape, device=wanted.device)
        return {
            "log_probs": zeros.index_put((wanted,), sampled),
            "entropy": zeros.index_put((wanted,), entropy),
        }

    def follow_settings(self) -> None:
        """Let rate, betas and decay be those of the settings; the state of a checkpoint brings its own."""
        settings, scheduler = self.settings, self.lr_scheduler
        rate = settings.learning_rate * rate_share(settings, scheduler.last_epoch)
        for group in self.optimizer.param_groups:
            group |= {"initial_lr": settings.learning_rate, "lr": rate}
            group |= {"betas": settings.betas, "weight_decay": settings.weight_decay}
        scheduler.base_lrs = [settings.learning_rate] * len(scheduler.base_lrs)

    def reshard(self) -> None:
        """Give up whole weights that a forward pass without backward left gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute without the LoRA adapter.

        PEFT's own switch changes ``requires_grad`` too, which FSDP takes over from whatever weights it finds then.
        """
        layers = [module for module in self.module.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        """Over the weights that are trained: with LoRA, the adapter's alone."""
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        return build_optimizer(trained, self.optimizer_config)

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_share, self.settings))


def join_ranks(rank: int, world_size: int, address: str, port: int) -> None:
    """Join the process group of the update: gloo on CPU, NCCL on CUDA."""
    backend = get_nccl_backend()
    if get_device_name() == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = f"cpu:gloo,cuda:{backend}"
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=world_size
    )


def build_engine(settings: UpdateSettings) -> PaddedEngine:
    """The engine with weights loaded and sharded; collective over the ranks.

    Raises ConfigError if verl runs on another device than the settings ask for.
    """
    if get_device_name() != settings.device:
        raise ConfigError(
            f"device={settings.device!r} was asked for, but this process already uses verl on "
            f"{get_device_name()!r}: give each device a process of its own"
        )
    lora = settings.lora
    optimizer = FSDPOptimizerConfig(
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        clip_grad=settings.gradient_clip,
    )
    model = HFModelConfig(
        path=settings.model_path,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        enable_gradient_checkpointing=settings.device == "cuda",
        **MODEL,
    )
    checkpoint = CheckpointConfig(save_lora_only=lora.rank > 0)
    return _initialise(settings, model, _sharding(settings, "fp32"), optimizer, checkpoint)


def build_reference(settings: UpdateSettings) -> PaddedEngine:
    """The reference model, sharded like the policy, in the dtype of its forward pass; nothing of it is trained."""
    model = HFModelConfig(
        path=settings.reference.model or settings.model_path, enable_gradient_checkpointing=False, **MODEL
    )
    sharding = _sharding(settings, PRECISION[settings.dtype])
    engine = _initialise(settings, model, sharding, FSDPOptimizerConfig(), CheckpointConfig())
    engine.module.requires_grad_(False)
    engine.optimizer = engine.lr_scheduler = None
    return engine


def _sharding(settings: UpdateSettings, model_dtype: str) -> FSDPEngineConfig:
    return FSDPEngineConfig(
        strategy="fsdp2",
        model_dtype=model_dtype,
        mixed_precision={
            "param_dtype": PRECISION[settings.dtype],
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        },
        # Gathering twice costs more than the memory it saves where a rank's memory is the machine's.
        reshard_after_forward=settings.device == "cuda",
        use_torch_compile=False,
        use_remove_padding=False,
    )


def _initialise(settings: UpdateSettings, *configs: Any) -> PaddedEngine:
    engine: PaddedEngine = EngineRegistry.new("language_model", BACKEND, *configs)
    engine.settings = settings
    transformers_logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # verl prints sizes
        engine.initialize()
    return engine
