"""Pictures in and out: reading, writing, pixels, adjustments, metadata. No torch."""
