"""Everything that decides what a training run makes, as frozen settings.

The shipped files began with ``CPU`` on two cores and were trained on by ``GPU`` on one
card; their own cards have the particulars.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tegula.models.mini.bundle import VOCABULARY_SIZE
from tegula.models.mini.network import NetworkShape
from train.batches import BatchSettings
from train.distil_pairs import DistilPairSettings
from train.line_pairs import LinePairSettings
from train.pairs import PairSettings
from train.tail_pairs import TailPairSettings

_CARD_CROP = 160


@dataclass(frozen=True)
class DiffusionSettings:
    """Stage one: predict the clean latent at every noise level.

    from_nothing: share of the rows whose noisy latent holds noise alone, as inference
    starts.
    """

    steps: int = 6000
    learning_rate: float = 5e-4
    warm_up: int = 100
    from_nothing: float = 0.3
    ema: float = 0.998
    batch: BatchSettings = field(default_factory=BatchSettings)


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in the sum that a network descends; 0 where a stage has no such loss.

    taught, taught_features: what a teacher made, by pixels and by features.
    pixel, edges, extremes, colour: place by place, against the original.
    low_bands: of the latents, against those of the original.
    source: of the result shrunk again, against the source.
    perceptual, dists, texture, statistics, energy, flat: look of the original, as
        ``train.losses`` has it.
    grid: what repeats from one pixel of the source to the next.
    artefacts: place by place, where the averaged weights do better.
    adversarial: what the discriminator says.
    """

    taught: float = 0.0
    taught_features: float = 0.0
    pixel: float = 0.0
    edges: float = 0.0
    extremes: float = 0.0
    colour: float = 0.0
    source: float = 0.0
    low_bands: float = 0.0
    perceptual: float = 0.0
    dists: float = 0.0
    texture: float = 0.0
    statistics: float = 0.0
    energy: float = 0.0
    flat: float = 0.0
    grid: float = 0.0
    artefacts: float = 0.0
    adversarial: float = 0.0


@dataclass(frozen=True)
class AdversarialSettings:
    """Stage two: one step from noise alone must look like a photograph.

    The weight of the adversarial loss grows with the noise level, so that creativity means
    something in one step.

    regularisation: weight of the discriminators' regularisation, at every so many steps.
    judged_multiple: rows are judged in multiples of so many, the rest of them wait for
        another batch. A graphics card plans its convolutions anew for every number of rows.
    """

    steps: int = 6000
    learning_rate: float = 4e-4
    discriminator_rate: float = 2e-4
    warm_up: int = 200
    weights: LossWeights = LossWeights(
        pixel=0.03, low_bands=0.05, perceptual=1.2, texture=3.0, statistics=30.0, energy=0.7,
        flat=5.0, adversarial=0.2,
    )  # fmt: skip
    regularisation: float = 1.0
    regularise_every: int = 8
    from_nothing: float = 0.8
    judged_multiple: int = 1
    ema: float = 0.998
    batch: BatchSettings = field(default_factory=lambda: BatchSettings(size=16, damaged=0.12))


@dataclass(frozen=True)
class TailSettings:
    """The prescaler's last layers: how many blocks, and how they are tuned.

    share: how far the exported weights go from the untuned (0) to the tuned ones (1).
    judges_grow: steps over which the weight of the adversarial loss grows to its full.
    """

    blocks: int = 2
    share: float = 1.0
    pairs: TailPairSettings = field(default_factory=TailPairSettings)
    steps: int = 800
    learning_rate: float = 2e-4
    discriminator_rate: float = 2e-4
    warm_up: int = 50
    most_gradient: float = 2.0
    judges_grow: int = 150
    weights: LossWeights = LossWeights(
        pixel=0.3, perceptual=4.5, texture=3.0, statistics=20.0, energy=0.9, flat=8.0,
        adversarial=0.12,
    )  # fmt: skip
    regularisation: float = 1.0
    regularise_every: int = 8
    ema: float = 0.995
    batch: BatchSettings = field(default_factory=lambda: BatchSettings(size=14))


@dataclass(frozen=True)
class RangesSettings:
    """On what the ranges of the large prescaler's channels are measured.

    blocks: the first so many get ranges; the last ones decide on grain in flat places.
    photographs, drawings: pictures of ``side`` pixels.
    shares: of the tuning, those between which sources are enlarged.
    covered: share of the pictures whose numbers fit into the ranges.
    """

    blocks: int = 20
    photographs: int = 48
    drawings: int = 16
    side: int = 64
    shares: tuple[float, ...] = (0.35, 0.65, 0.8)
    covered: float = 0.95


@dataclass(frozen=True)
class DistilSettings:
    """The small prescaler: how deep, and how it is taught.

    twice: weight of the head for 2x beside the one for 4x.
    judges_from, judges_grow: the step from which the discriminator counts, and over how many
        more its weight grows to the whole.
    """

    convolutions: int = 32
    pairs: DistilPairSettings = field(default_factory=DistilPairSettings)
    steps: int = 3000
    learning_rate: float = 1.5e-4
    discriminator_rate: float = 2e-4
    warm_up: int = 30
    most_gradient: float = 2.0
    judges_from: int = 250
    judges_grow: int = 200
    twice: float = 0.5
    weights: LossWeights = LossWeights(
        taught=0.6, taught_features=3.0, colour=0.5, perceptual=2.0, texture=3.0, statistics=30.0,
        energy=0.6, flat=10.0, adversarial=0.45,
    )  # fmt: skip
    ema: float = 0.997
    batch: BatchSettings = field(default_factory=lambda: BatchSettings(size=8, crop=192, parts=1))


@dataclass(frozen=True)
class TwiceSettings:
    """What the small prescaler runs for up to 2x, or for 4x: how it is trained on.

    recipe_shares: of ``train.degradation.RECIPES``. side: pixels of the held-out truths.
    sharpened: share of the crops that are soft and were sharpened, in place of those recipes.
    qualities: bounds of JPEG's quality, where all of those are JPEG.
    The other names are those of ``DistilSettings``.
    """

    recipe_shares: tuple[float, float, float] = (0.6, 0.32, 0.08)
    sharpened: float = 0.0
    qualities: tuple[int, int] | None = None
    side: int = 256
    steps: int = 1600
    learning_rate: float = 8e-5
    discriminator_rate: float = 2e-4
    warm_up: int = 30
    most_gradient: float = 2.0
    judges_from: int = 200
    judges_grow: int = 200
    weights: LossWeights = LossWeights(
        pixel=0.35, edges=0.3, colour=0.5, perceptual=4.0, texture=3.0, statistics=30.0,
        energy=0.6, flat=10.0, adversarial=0.35,
    )  # fmt: skip
    ema: float = 0.997
    batch: BatchSettings = field(default_factory=lambda: BatchSettings(size=9, crop=96, parts=1))


@dataclass(frozen=True)
class LineSettings:
    """The small prescaler for what is drawn: how deep, and how it is taught.

    Names are those of ``DistilSettings``.
    """

    convolutions: int = 16
    pairs: LinePairSettings = field(default_factory=LinePairSettings)
    steps: int = 3400
    learning_rate: float = 4e-4
    discriminator_rate: float = 2e-4
    warm_up: int = 30
    most_gradient: float = 4.0
    judges_from: int = 2000
    judges_grow: int = 400
    twice: float = 0.6
    weights: LossWeights = LossWeights(
        pixel=1.0, edges=0.7, extremes=1.0, perceptual=1.5, energy=0.25, adversarial=0.05
    )
    ema: float = 0.998
    batch: BatchSettings = field(default_factory=lambda: BatchSettings(size=8, crop=160, parts=1))


@dataclass(frozen=True)
class SecondSettings:
    """The large prescaler's second stage, which needs a graphics card; none has run it yet.

    blocks: the last so many residual blocks are trained, of 23, and all layers after them.
    qualities: bounds of JPEG's quality. last: steps at the end, at a tenth of the rates.
    judge_width: channels of the discriminator at full size.
    The other names are those of ``TwiceSettings``.
    """

    blocks: int = 23
    recipe_shares: tuple[float, float, float] = (0.25, 0.4, 0.35)
    qualities: tuple[int, int] = (30, 95)
    side: int = 256
    steps: int = 2000
    last: int = 400
    learning_rate: float = 1e-4
    discriminator_rate: float = 1e-4
    warm_up: int = 50
    most_gradient: float = 2.0
    judges_from: int = 300
    judges_grow: int = 200
    judge_width: int = 64
    weights: LossWeights = LossWeights(
        source=0.5, perceptual=4.0, dists=2.0, texture=3.0, statistics=30.0, energy=1.2,
        flat=8.0, artefacts=1.0, adversarial=0.1,
    )  # fmt: skip
    ema: float = 0.999
    batch: BatchSettings = field(
        default_factory=lambda: BatchSettings(size=48, crop=_CARD_CROP, parts=1)
    )


PupilSettings = DistilSettings | TwiceSettings | LineSettings | SecondSettings


@dataclass(frozen=True)
class RunSettings:
    """One whole run; ``workers``: processes that make pairs and batches beside it."""

    name: str
    shape: NetworkShape
    pairs: PairSettings = field(default_factory=PairSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    tail: TailSettings = field(default_factory=TailSettings)
    ranges: RangesSettings = field(default_factory=RangesSettings)
    distil: DistilSettings = field(default_factory=DistilSettings)
    twice: TwiceSettings = field(default_factory=TwiceSettings)
    sharpened: TwiceSettings = TwiceSettings(
        recipe_shares=(0.15, 0.65, 0.2), sharpened=0.72, steps=1500
    )
    compressed: TwiceSettings = TwiceSettings(sharpened=1.0, qualities=(70, 99), steps=3000)
    four: TwiceSettings = TwiceSettings(
        recipe_shares=(0.0, 1.0, 0.0),
        sharpened=0.85,
        steps=8000,
        weights=LossWeights(
            pixel=0.15, edges=0.15, colour=0.5, perceptual=3.0, texture=3.0, statistics=45.0,
            energy=0.8, flat=10.0, grid=10.0, artefacts=0.5, adversarial=0.5,
        ),
        ema=0.999,
        batch=BatchSettings(size=9, crop=160, parts=1),
    )  # fmt: skip
    line: LineSettings = field(default_factory=LineSettings)
    second: SecondSettings = field(default_factory=SecondSettings)
    held_out_every: int = 14
    checkpoint_every: int = 250
    samples_every: int = 500
    seed: int = 1
    workers: int = 0


CPU = RunSettings(
    name="cpu",
    shape=NetworkShape(words=VOCABULARY_SIZE),
    pairs=PairSettings(count=2400, shard=100),
    diffusion=DiffusionSettings(steps=600),
    adversarial=AdversarialSettings(steps=9600),
)

GPU = RunSettings(
    name="gpu",
    shape=NetworkShape(words=VOCABULARY_SIZE),
    pairs=PairSettings(count=10_000, shard=100),
    diffusion=DiffusionSettings(steps=600, batch=BatchSettings(size=64, crop=_CARD_CROP, parts=1)),
    adversarial=AdversarialSettings(
        steps=5000,
        learning_rate=2e-4,
        judged_multiple=16,
        ema=0.999,
        batch=BatchSettings(size=64, crop=_CARD_CROP, damaged=0.12, parts=1),
    ),
    tail=TailSettings(
        blocks=8,
        share=0.65,
        pairs=TailPairSettings(count=8000, shard=100),
        steps=2200,
        warm_up=100,
        judges_grow=300,
        weights=LossWeights(
            pixel=0.3,
            perceptual=6.0,
            texture=3.0,
            statistics=30.0,
            energy=1.2,
            flat=8.0,
            adversarial=0.2,
        ),
        ema=0.999,
        batch=BatchSettings(size=48, crop=_CARD_CROP, parts=1),
    ),
    # Not run yet on a card; what is shipped is the processor's.
    distil=DistilSettings(
        pairs=DistilPairSettings(count=8000),
        steps=8000,
        learning_rate=2e-4,
        warm_up=100,
        judges_from=1000,
        judges_grow=1000,
        ema=0.999,
        batch=BatchSettings(size=32, crop=192, parts=1),
    ),
    workers=14,
)
"""Twenty minutes on one card; a step of either network waits for the processor, not for it."""

LARGE = replace(
    GPU,
    name="large",
    shape=NetworkShape(
        widths=(128, 192, 256), down=(3, 3), middle=4, up=(3, 4), words=VOCABULARY_SIZE
    ),
    diffusion=replace(GPU.diffusion, steps=6000),
    adversarial=replace(GPU.adversarial, steps=14_000),
    tail=replace(GPU.tail, steps=6000),
)
"""Not run yet: an hour on one card, for a network of 11 million parameters."""

CONFIGURATIONS = {settings.name: settings for settings in (CPU, GPU, LARGE)}
