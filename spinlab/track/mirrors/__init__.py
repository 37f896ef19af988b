"""Mirrors of the record: a module for each, which starts it where the settings ask for it."""

from spinlab.track.mirrors import csv, tensorboard, wandb

MIRRORS = (csv.start, tensorboard.start, wandb.start)
