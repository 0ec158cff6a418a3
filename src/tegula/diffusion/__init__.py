"""The loop of tiled diffusion: guidance, canvas sampling, schedulers, autoencoder."""
