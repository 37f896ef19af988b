"""Rotations of the residual stream, the heads and the MLP, and how they enter a network.

The convention, said once: activations are rows and weights are (out, in). A rotation R takes a
row x into x R. A linear that reads the rotated stream gets W R, one that writes it Rᵀ W.

R1 (hidden, hidden)        the residual stream, one for the model, fused
R2 (head_dim, head_dim)    values per head, one per layer, fused into values and output
latents (width, width)     what queries, or keys and values, are made of; one for the model, fused
R3 (head_dim, head_dim)    queries and keys after RoPE, one for the model or per layer, online
R4 (intermediate, ...)     what a gated MLP multiplies last, online, its inverse fused there; one
                           for each width that there is
"""
