"""One upscale: prepare, prescale, refine, finish."""
