"""Fake quantization: what the input of a linear goes through, and how it gets there."""
