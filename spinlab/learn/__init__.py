"""Learning rotations, the transforms of inputs, and ranges, against the quantized network.

`loop` does a step. What the network computes is a form: `activations` where weights stay in 16
bits, `weights` where they are rounded in the loop, `plain` the definition that both must equal.
`parameters` holds the rotations and turns what the forms hand in (`turn`, `inputs`, `local`) into
Riemannian gradients for the `optimizers`, clipped by their own norm or that of Euclidean ones.
"""
