"""Training: the loop and what surrounds it (metrics, guards, checkpoints, the run folder)."""
