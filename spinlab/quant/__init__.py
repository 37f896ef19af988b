"""Quantizers: integer arithmetic, clip search, packing, and what happens to a linear's input."""
