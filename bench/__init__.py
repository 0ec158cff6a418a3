"""Benches: what tegula is measured by."""
