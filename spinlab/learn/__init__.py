"""Learning R1 and R2: the optimizer, the schedule and the loop."""
