"""Models: how they are loaded, and where rotations and quantizers enter them."""
