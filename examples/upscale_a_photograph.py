"""Enlarge a photograph and say what was done."""

from pathlib import Path

from tegula import Upscaler

photograph = Path(__file__).parent / "cat.jpg"
upscaler = Upscaler.load()
result = upscaler.upscale(photograph, scale=2, crop=(120, 80, 96, 96), seed=1)
result.save("cat-large.png")
print(f"{result.image.size[0]}x{result.image.size[1]} px, seed {result.seed}")
