"""Stable Diffusion's classes with some ten thousand seeded random weights.

Everything runs as with real weights, in milliseconds; what comes out is noise that depends on
every input. The benches use them too, to try themselves out.
"""
