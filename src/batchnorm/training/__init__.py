"""Training: one loop, checkpoints, and many runs side by side."""
