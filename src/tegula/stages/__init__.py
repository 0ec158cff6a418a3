"""The steps of an upscale: prepare, prescale, refine, finish."""
