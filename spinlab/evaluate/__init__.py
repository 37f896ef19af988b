"""Evaluate an artefact again: what its record measured, on this machine, and whether it agrees.

again     texts, questions and windows of the record, measured by the code of runs
verdict   what agrees with what, how closely it must, and how that is shown
"""
