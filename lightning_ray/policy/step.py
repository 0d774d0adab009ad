"""One optimizer step: forward and backward over the micro batches of a minibatch, gradients exchanged at the last."""

from __future__ import annotations

import math

from lightning_ray.policy.micro_batch import LogprobGap, Minibatch, Tally
from lightning_ray.policy.settings import DivergedError, UpdateSettings
from lightning_ray.policy.verl_backend.engine import PaddedEngine
from lightning_ray.policy.verl_backend.losses import PEAKS, minibatch_loss


def optimizer_step(
    settings: UpdateSettings,
    engine: PaddedEngine,
    minibatch: Minibatch,
    world_size: int,
    gap: LogprobGap | None,
    update: int,
) -> dict[str, float]:
    """Step once; collective. Returns ``loss``, ``grad_norm`` (before clipping), ``learning_rate``, and sums over the
    minibatch's trained tokens: ``kl`` (of a policy objective), ``entropy`` and those of the loss function.

    Raises DivergedError, naming the ``update``, if loss or gradient is not finite; no weight is changed then.
    """
    loss_function = minibatch_loss(settings, world_size)
    device = next(engine.module.parameters()).device
    engine.optimizer_zero_grad()
    tally = Tally(PEAKS)
    for index, micro in enumerate(minibatch.micro_batches):
        engine.module.set_requires_gradient_sync(index == len(minibatch.micro_batches) - 1)
        loss, output = engine.forward_step(micro, loss_function, forward_only=False)
        loss.backward()
        logprobs = output["model_output"]["log_probs"].cpu()
        measured = {"loss": output["loss"] / world_size, "entropy": float(output["model_output"]["entropy"].sum())}
        if settings.objective == "policy":
            measured["kl"] = float((micro["logprobs"] - logprobs)[micro["wanted"]].sum())
        tally.add(measured | output["metrics"])
        if gap is not None:
            gap.add(logprobs, micro)
    figures = tally.over_ranks(device)
    _check_finite("loss", figures["loss"], settings, update)
    figures["learning_rate"] = engine.optimizer.param_groups[0]["lr"]
    figures["grad_norm"] = engine.optimizer_step()  # verl skips the step if the norm is not finite
    _check_finite("gradient norm", figures["grad_norm"], settings, update)
    engine.lr_scheduler_step()
    return figures


def _check_finite(what: str, value: float, settings: UpdateSettings, update: int) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"the {what} of update {update} is {value}; this step changed no weight. Lower "
            f"learning_rate (now {settings.learning_rate}) and resume from the last checkpoint"
        )
