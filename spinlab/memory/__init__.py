"""Memory: what the machine has, what each stage takes at least, and whether the one fits the other.

Nothing is loaded to know: a stage's need follows from the model's shape and the settings.
"""
