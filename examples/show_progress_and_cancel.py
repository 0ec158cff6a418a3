"""Follow an upscale as it runs, and stop it half way."""

from pathlib import Path

from tegula import TegulaError, UpscaleOptions, Upscaler
from tegula.progress import Progress

photograph = Path(__file__).parent / "cat.jpg"
fractions = [0.0]


def follow(progress: Progress) -> None:
    """Print one line per report and remember how far the work is."""
    fractions.append(progress.fraction)
    print(f"{progress.fraction:4.0%} {progress.stage} {progress.done}/{progress.total}")


try:
    Upscaler.load().upscale(
        photograph,
        UpscaleOptions(scale=2, crop=(120, 80, 96, 96), prescaler="lanczos"),
        on_progress=follow,
        cancelled=lambda: fractions[-1] > 0,
    )
except TegulaError as error:
    print(error)
