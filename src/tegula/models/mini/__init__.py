"""mini: the tile-diffusion model that tegula trains and carries itself."""
