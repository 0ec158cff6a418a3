"""Who runs a prediction."""
