"""Optimizers that measure a step in the geometry of the network's own function."""
