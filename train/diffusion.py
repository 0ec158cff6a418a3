"""Stage one: the network learns to predict the clean latent at every noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from tegula.models.mini.network import DEVIATIONS, control_channels, to_blocks
from train import losses
from train.batches import Batch, luma_difference
from train.config import DiffusionSettings
from train.noise import TIMESTEPS, add_noise, signal_shares
from train.parallel import map_parts, mean_logs, split
from train.precision import mixed_precision
from train.state import TrainingState


def clean_latents(batch: Batch) -> Tensor:
    """Return the latents of the target, [n, 16, h/4, w/4]."""
    scale = torch.tensor(DEVIATIONS, device=batch.target.device).view(1, -1, 1, 1)
    return to_blocks(luma_difference(batch)) / scale


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Return timesteps, more of them in the upper half, [n] integers."""
    level = torch.sigmoid(torch.randn(count, generator=generator) * 1.2 + 0.4)
    return (level * (TIMESTEPS - 1)).round().long()


def faded_target(clean: Tensor, timesteps: Tensor) -> Tensor:
    """Return what a start from noise alone should lead to at this noise level.

    Noise alone says "nothing differs from the prescaled picture", the louder the less
    noise there is. From half way up the answer is the whole truth; below, a part of it:
    this is what makes creativity a dial in a single step.
    """
    return clean * strength_share(timesteps).view(-1, 1, 1, 1)


def strength_share(timesteps: Tensor) -> Tensor:
    """Return the part of the truth, 0..1, smoothly up to 1 at timestep 500."""
    x = (timesteps.float() / 500).clamp(0, 1)
    return x * x * (3 - 2 * x)


def network_input(
    clean: Tensor,
    from_nothing: float,
    timesteps: Tensor,
    state: TrainingState,
) -> tuple[Tensor, Tensor]:
    """Return noisy latents and the target that belongs to them."""
    device = clean.device
    noise = torch.randn(clean.shape, generator=state.generator).to(device)
    nothing = (torch.rand(len(clean), generator=state.generator) < from_nothing).to(device)
    keep = (~nothing).float().view(-1, 1, 1, 1)
    noisy = add_noise(clean * keep, noise, timesteps, signal_shares(device=device))
    target = clean * keep + faded_target(clean, timesteps) * (1 - keep)
    return noisy, target


def diffusion_step(
    state: TrainingState, settings: DiffusionSettings, batch: Batch
) -> dict[str, Tensor]:
    """Take one optimiser step; returns the losses."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    clean = clean_latents(batch)
    timesteps = draw_timesteps(len(clean), state.generator).to(device)
    noisy, target = network_input(clean, settings.from_nothing, timesteps, state)
    control = control_channels(batch.control) * batch.seen
    parts = split(len(clean), settings.batch.parts if device.type == "cpu" else 1)
    optimiser = state.optimisers["network"]
    set_rate(optimiser, settings.learning_rate, state.step, settings.warm_up, settings.steps)
    optimiser.zero_grad(set_to_none=True)

    def backward(rows: slice) -> dict[str, Tensor]:
        level = timesteps[rows] / TIMESTEPS
        with mixed_precision(device):
            predicted = state.network(noisy[rows], level, control[rows], batch.words[rows])
        loss = losses.rows((predicted.float() - target[rows]).square()).mean()
        (loss / len(parts)).backward()  # type: ignore[no-untyped-call]
        return {"loss": loss}

    logged = mean_logs(map_parts(backward, parts))
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    optimiser.step()
    return {**logged, "gradient": norm}


def set_rate(
    optimiser: torch.optim.Optimizer, rate: float, step: int, warm_up: int, steps: int
) -> None:
    """Warm up linearly, hold, and fall linearly to a tenth over the last third."""
    left = max(0.0, (steps - step) / (steps / 3))
    factor = min(1.0, (step + 1) / warm_up, 0.1 + 0.9 * left)
    for group in optimiser.param_groups:
        group["lr"] = rate * factor
