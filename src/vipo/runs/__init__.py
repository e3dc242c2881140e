"""A run and its folder: train, evaluate, keep, resume, and open again to sample from."""
