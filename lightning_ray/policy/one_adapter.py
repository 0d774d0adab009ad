"""LoRA on CPU where all tokens of a step have the same adapter: two matrix products a layer.

vLLM's own way on CPU copies the adapter's matrices once for every token, for there might be another adapter for each:
with an 80M model a prompt's tokens take five times as long as without an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class OneAdapterWrapper(PunicaWrapperCPU):
    """Steps in which tokens differ in their adapter are vLLM's business."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **options: Any,
    ) -> None:
        """y [T, out] += scale * x [T, in] A^T B^T, slice by slice of y."""
        if self.no_lora:
            return
        if not self.is_prefill or self.batch_size != 1:  # counts runs of tokens with one adapter
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **options)
            return
        slot = int(self._lora_indices_per_batch[0])
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        begin = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, begin : begin + width].addmm_(x @ a[slot, 0].T, b[slot, 0].T, alpha=scale)
            begin += width


def register() -> None:
    """Have vLLM compute with this class on CPU; harmless when repeated."""
    if current_platform.is_cpu():
        name = f"{OneAdapterWrapper.__module__}.{OneAdapterWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)  # type: ignore[method-assign, assignment]
