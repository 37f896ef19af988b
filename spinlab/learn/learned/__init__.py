"""What is learned: rotations, transforms of inputs, and ranges."""
