"""What leaves spinlab: rotations for other tools, and rotated checkpoints with their manifest."""
