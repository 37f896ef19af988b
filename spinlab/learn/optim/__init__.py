"""Optimizers on the manifold of rotations, and their schedule."""
