"""Two ways to compute a step, with numbers in the stream's own basis or in the rotated one."""
