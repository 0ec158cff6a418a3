"""Which latents: an exact block transform, or a small autoencoder trained for them?

Both have 16 channels at a quarter of the resolution and hold the luma difference to the
prescaled picture. For each, the same small network is trained by the same number of
diffusion steps; what is told is what is lost by encoding and decoding alone, and how
pictures of ten steps compare with the prescaled ones.

    python -m train.compare_latents --work runs/mini

reads the pairs that ``python -m train pairs`` made. ``docs/decisions`` has what came out.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tegula.models.bundle import ControlImage
from tegula.models.mini.bundle import VOCABULARY_SIZE
from tegula.models.mini.network import (
    CHANNELS,
    DEVIATIONS,
    MiniNetwork,
    NetworkShape,
    control_channels,
    from_blocks,
    luma,
    to_blocks,
)
from train import losses
from train.batches import BatchSettings, PairSource, luma_difference
from train.config import CPU
from train.degradation import Picture
from train.diffusion import draw_timesteps
from train.held_out import HeldOut, read_held_out, table
from train.noise import TIMESTEPS, add_noise, signal_shares
from train.parallel import map_parts, split
from train.runner import new_state

SHAPE = NetworkShape(widths=(64, 96, 128), middle=2, words=VOCABULARY_SIZE)
BATCH = BatchSettings(size=16, crop=96, damaged=0.0, hidden=0.0)
_SAMPLING_STEPS = 10
_RATE = 6e-4


@dataclass(frozen=True)
class Latents:
    """A way to and from latents; both maps take and return [n, channels, h, w]."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


class SmallAutoencoder(nn.Module):
    """Two halvings of the resolution and 16 channels: 0.2 million parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width // 2, width, 2, stride=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 2, stride=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, CHANNELS, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 2, stride=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, 2, stride=2), nn.ReLU(),
            nn.Conv2d(width // 2, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, difference: Tensor) -> Tensor:
        """Return the difference [n, 1, h, w] after encoding and decoding."""
        return self.decoder(self.encoder(difference))  # type: ignore[no-any-return]


def block_transform() -> Latents:
    """Return mini's own latents."""
    scale = torch.tensor(DEVIATIONS).view(1, -1, 1, 1)
    return Latents(
        "block transform", lambda x: to_blocks(x) / scale, lambda z: from_blocks(z * scale)
    )


def trained_autoencoder(source: PairSource, steps: int) -> Latents:
    """Train a small autoencoder on differences; its latents have unit deviation."""
    torch.manual_seed(1)
    autoencoder, rng = SmallAutoencoder(), np.random.default_rng(1)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=1e-3)
    for step in range(steps):
        difference = luma_difference(source.draw(BATCH, rng))
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - 0.95 * step / steps)
        optimiser.zero_grad(set_to_none=True)
        parts = split(len(difference), 2)

        def backward(part: slice, difference: Tensor = difference) -> None:
            error = (autoencoder(difference[part]) - difference[part]).abs().mean()
            (error / 2).backward()

        map_parts(backward, parts)
        optimiser.step()
    autoencoder.requires_grad_(requires_grad=False)
    latents = autoencoder.encoder(luma_difference(source.draw(replace(BATCH, size=64), rng)))
    mean, deviation = (f(latents, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return Latents(
        "trained autoencoder",
        lambda x: (autoencoder.encoder(x) - mean) / deviation,
        lambda z: autoencoder.decoder(z * deviation + mean),
    )


def train_network(latents: Latents, source: PairSource, steps: int) -> MiniNetwork:
    """Train a small network to predict clean latents; return its running average."""
    state = new_state(replace(CPU, shape=SHAPE), torch.device("cpu"), _RATE)
    shares, optimiser = signal_shares(), state.optimisers["network"]
    rng = np.random.default_rng(CPU.seed)
    for step in range(steps):
        batch = source.draw(BATCH, rng)
        clean = latents.encode(luma_difference(batch))
        timesteps = draw_timesteps(len(clean), state.generator)
        noisy = add_noise(
            clean, torch.randn(clean.shape, generator=state.generator), timesteps, shares
        )
        control = control_channels(batch.control)
        optimiser.param_groups[0]["lr"] = _RATE * min(1, (step + 1) / 50, 1.05 - step / steps)
        optimiser.zero_grad(set_to_none=True)

        def backward(
            part: slice,
            inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = (
                noisy, timesteps, control, batch.words, clean,
            ),
        ) -> None:  # fmt: skip
            x, t, c, words, wanted = (value[part] for value in inputs)
            error = losses.rows((state.network(x, t / TIMESTEPS, c, words) - wanted).square())
            (error.mean() / 2).backward()  # type: ignore[no-untyped-call]

        map_parts(backward, split(len(clean), 2))
        torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
        optimiser.step()
        state.step += 1
        state.update_average(0.995)
    network = state.average
    assert isinstance(network, MiniNetwork)
    return network.eval()


@torch.inference_mode()
def refine(
    latents: Latents, network: MiniNetwork, row: Picture, generator: torch.Generator
) -> Picture:
    """Return a pair's prescaled picture with the difference of ten DDIM steps from noise."""
    images = torch.from_numpy(row).permute(2, 0, 1)[None]
    control = control_channels(ControlImage(images[:, 3:6], images[:, 6:9]))
    shape = (1, CHANNELS, images.shape[2] // 4, images.shape[3] // 4)
    x = torch.randn(shape, generator=generator)
    shares = signal_shares()
    times = [*torch.linspace(TIMESTEPS - 1, 0, _SAMPLING_STEPS + 1).long().tolist()]
    clean = x
    for now, following in itertools.pairwise(times):
        level = torch.tensor([now / TIMESTEPS])
        clean = network(x, level, control, torch.zeros(1, VOCABULARY_SIZE))
        noise = (x - shares[now].sqrt() * clean) / (1 - shares[now]).sqrt()
        x = shares[following].sqrt() * clean + (1 - shares[following]).sqrt() * noise
    picture = images[:, 3:6] + latents.decode(clean)
    return np.clip(picture[0].permute(1, 2, 0).numpy(), 0, 1)  # type: ignore[no-any-return]


@torch.inference_mode()
def lost(latents: Latents, held_out: HeldOut) -> float:
    """Return the PSNR in dB of held-out truths after encoding and decoding alone."""
    errors = []
    for row in held_out.pairs:
        images = torch.from_numpy(row).permute(2, 0, 1)[None]
        difference = luma(images[:, :3]) - luma(images[:, 3:6])
        errors.append(
            float((latents.decode(latents.encode(difference)) - difference).square().mean())
        )
    return float(-10 * np.log10(max(float(np.mean(errors)), 1e-12)))


def main() -> None:
    """Train and judge both."""
    parser = argparse.ArgumentParser(prog="python -m train.compare_latents", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/mini"))
    parser.add_argument("--steps", type=int, default=500, help="diffusion steps of each")
    parser.add_argument("--autoencoder-steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = PairSource(arguments.work / "pairs")
    held_out = HeldOut(read_held_out(arguments.work / "held-out.npy"))
    for make in (block_transform, lambda: trained_autoencoder(source, arguments.autoencoder_steps)):
        began = time.monotonic()
        latents = make()
        print(f"{latents.name}: {lost(latents, held_out):.1f} dB by encoding alone", flush=True)
        network = train_network(latents, source, arguments.steps)
        generator = torch.Generator().manual_seed(0)
        pictures = [refine(latents, network, row, generator) for row in held_out.pairs]
        print(table([held_out.compare(latents.name, pictures)]))
        print(f"{(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
