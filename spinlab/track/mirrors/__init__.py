"""Mirrors of the record: every field of `spinlab.config.TrackerConfig` names a module here.

Its `start` returns the mirror where the settings ask for it, and None elsewhere.
"""
