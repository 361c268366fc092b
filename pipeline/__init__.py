"""What every stage shares: configuration, run directory, checkpoints, metrics. Knows no image and no layer."""
