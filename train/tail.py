"""Tunes the last layers of Real-ESRGAN x4plus, the prescaler that mini builds on.

x4plus was trained for pictures worse than most, and smooths what it could have kept. Its
first blocks have learned more than two cores can teach; so they stay, run once over each
pair, and only what comes after them is trained on: the last residual blocks and the
layers that make the picture. Judges and losses are those of mini's second stage.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.quality.features import EarlyFeatures
from tegula.models.mini.network import luma
from tegula.models.prescalers.networks import RRDBNet
from train import losses
from train.config import TailSettings
from train.diffusion import set_rate
from train.discriminator import FEATURE_CHANNELS, Judges, deceive_loss
from train.judged import Judged, likeness, ready_judges, weighted_sum
from train.parallel import map_parts, mean_logs, split
from train.precision import mixed_precision
from train.state import TrainingState
from train.tail_pairs import FACTOR, TailBatch

_FROZEN = "conv_first."


def cut_tail(network: RRDBNet, blocks: int) -> RRDBNet:
    """Return a copy of a network's last blocks and all that follows, ready for training.

    Its first convolution stays as it is: the picture is made of what it sees, too.
    """
    tail = RRDBNet(blocks)
    first = len(network.body) - blocks
    state = network.state_dict()
    tail.load_state_dict({name: state[_name_in_whole(name, first)] for name in tail.state_dict()})
    tail.conv_first.requires_grad_(requires_grad=False)
    return tail


def tuned_tensors(tail: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """Return what was tuned, by the names of the whole network, whose block ``first`` it begins."""
    return {_name_in_whole(n, first): t for n, t in tail.items() if not n.startswith(_FROZEN)}


def interpolate(
    untuned: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Return weights on the straight line from an untuned tail (0) to a tuned one (1).

    A network that was tuned from another stays good all the way, and the share weighs
    what either does well (network interpolation; Wang et al., "ESRGAN", 2018).
    """
    return {name: torch.lerp(untuned[name], tensor, share) for name, tensor in tuned.items()}


def with_tail(network: RRDBNet, tail: Mapping[str, Tensor], blocks: int) -> RRDBNet:
    """Return a copy of a network with a tuned tail of so many blocks."""
    whole = copy.deepcopy(network)
    tuned = tuned_tensors(tail, len(network.body) - blocks)
    whole.load_state_dict({**network.state_dict(), **tuned})
    return whole


def _name_in_whole(name: str, first: int) -> str:
    if not name.startswith("body."):
        return name
    _, block, rest = name.split(".", 2)
    return f"body.{int(block) + first}.{rest}"


def run_tail(tail: RRDBNet, batch: TailBatch) -> Tensor:
    """Return pictures [n, 3, 4h, 4w], not clamped."""
    return tail.finish(tail.conv_first(batch.small), tail.body(batch.seen))


def new_tail_state(
    tail: RRDBNet, settings: TailSettings, seed: int, device: torch.device
) -> TrainingState:
    """Return the state of a run that begins with the weights of x4plus."""
    torch.manual_seed(seed)
    tail, judges = tail.to(device), Judges(FEATURE_CHANNELS).to(device)
    trained = [p for p in tail.parameters() if p.requires_grad]
    return TrainingState(
        tail,
        copy.deepcopy(tail).requires_grad_(requires_grad=False),
        {
            "network": torch.optim.Adam(trained, lr=settings.learning_rate, betas=(0.9, 0.99)),
            "judges": torch.optim.Adam(
                judges.parameters(), lr=settings.discriminator_rate, betas=(0.5, 0.99)
            ),
        },
        {"judges": judges},
        torch.Generator().manual_seed(seed),
    )


def tail_step(
    state: TrainingState, settings: TailSettings, features: EarlyFeatures, batch: TailBatch
) -> dict[str, Tensor]:
    """Take one step of the tail and one of the discriminators; returns the losses."""
    device = next(state.network.parameters()).device
    batch = batch.to(device)
    parts = split(len(batch.truth), settings.batch.parts if device.type == "cpu" else 1)
    judges = ready_judges(state.extras["judges"])
    for optimiser in state.optimisers.values():
        optimiser.zero_grad(set_to_none=True)
    trust = min(1.0, state.step / settings.judges_grow)

    def generate(part: slice) -> tuple[Judged, dict[str, Tensor]]:
        seen, colours = _judged(state.network, features, batch.rows(part))
        found = {
            "perceptual": losses.perceptual(seen.fake_features, seen.real_features).mean(),
            "statistics": losses.statistics(seen.fake_features, seen.real_features),
            "adversarial": trust * _deceived(seen, judges),
            **likeness(seen),
            "pixel": colours,
        }
        total = weighted_sum(found, settings.weights)
        (total / len(parts)).backward()  # type: ignore[no-untyped-call]
        return seen, found

    made = map_parts(generate, parts)
    norm = _update(state, settings)
    regularise = state.step % settings.regularise_every == 0
    weight = settings.regularisation if regularise else 0.0
    seeds = torch.randint(2**62, (len(parts),), generator=state.generator).tolist()

    def judge(part: tuple[Judged, int]) -> dict[str, Tensor]:
        return part[0].train_judges(judges, weight, part[1], len(parts))

    logs = map_parts(judge, [(seen, seed) for (seen, _), seed in zip(made, seeds, strict=True)])
    state.optimisers["judges"].step()
    return {**mean_logs([log for _, log in made] + logs), "gradient": norm}


def _judged(tail: nn.Module, features: EarlyFeatures, batch: TailBatch) -> tuple[Judged, Tensor]:
    """Return pictures beside their truth, and how far they are apart in colour."""
    source = nn.functional.interpolate(batch.small, scale_factor=FACTOR, mode="bicubic")
    source = source.clamp(0, 1)
    with mixed_precision(batch.small.device):
        fake = run_tail(tail, batch)  # type: ignore[arg-type]
        fake_features = features(fake)
        with torch.no_grad():
            both = features(torch.cat([batch.truth, source]))
    count, grey = len(source), luma(source)
    seen = Judged(
        luma(fake),
        luma(batch.truth),
        fake_features,
        [f[:count] for f in both],
        torch.cat([grey, grey], dim=1),
        [f[count:] for f in both],
    )
    return seen, (fake - batch.truth).abs().mean() * 10


def _deceived(seen: Judged, judges: nn.Module) -> Tensor:
    return deceive_loss(seen.fake_verdicts(judges), torch.ones(len(seen.fake)).to(seen.fake))


def _update(state: TrainingState, settings: TailSettings) -> Tensor:
    optimiser = state.optimisers["network"]
    set_rate(optimiser, settings.learning_rate, state.step, settings.warm_up, settings.steps)
    trained = [p for p in state.network.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.most_gradient)
    optimiser.step()
    # The losses went through the discriminators and left gradients there.
    state.optimisers["judges"].zero_grad(set_to_none=True)
    return norm
