"""Stable Diffusion 1.5 with the tile ControlNet, loaded through diffusers."""
