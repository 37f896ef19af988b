"""Tracking: the local record is the source of every number; W&B and TensorBoard mirror it."""
