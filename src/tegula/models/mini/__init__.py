"""mini: the tile-diffusion model that tegula trains and carries itself.

Where its files lie stands here, where it is read without torch.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_FILE = "mini.safetensors"
CONFIG_FILE = "config.json"
