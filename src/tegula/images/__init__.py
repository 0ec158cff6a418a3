"""Pictures in and out: decoding, encoding, colour, metadata. No torch."""
