"""Number formats: how a range becomes levels and back, on each device, with gradients."""
