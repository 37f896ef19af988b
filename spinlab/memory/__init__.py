"""Memory and time: what the machine has, what each stage takes at least, and whether that fits.

Nothing is loaded to know: a stage's need and its work follow from the model's shape and the
settings.
"""
