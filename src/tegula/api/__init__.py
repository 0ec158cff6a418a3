"""Replicate's HTTP API over the catalogue, the prediction store and an engine."""
