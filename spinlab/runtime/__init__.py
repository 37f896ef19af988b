"""The integer runtime: linears that multiply integers, and the hand-off of a model to them."""
