"""Plain torch engine: models, checkpoints, conditioning, sampling, training, metrics."""
