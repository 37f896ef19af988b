"""Learning rotations, the transforms of inputs, and ranges, against the quantized network.

`loop` does a step. What the network computes is one of the `spaces`: `activations` where weights
stay in 16 bits, `weights` where they are rounded in the loop, `definition` what both must equal.
`learned` holds what is learned and turns what a space hands in into Riemannian gradients for an
optimizer of `optim`, clipped by their own norm or that of Euclidean ones.
"""
