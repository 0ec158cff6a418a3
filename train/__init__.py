"""How mini is made: data, degradation, training, evaluation, export."""
