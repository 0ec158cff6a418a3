"""Bundles and prescalers, and the packaged weights beside their cards."""
