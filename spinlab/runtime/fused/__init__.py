"""A model of its own on fused operations, with its cache and CUDA graphs."""
