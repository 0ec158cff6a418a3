"""Replicate's HTTP API on one's own machine."""
