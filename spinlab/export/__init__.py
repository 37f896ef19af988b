"""What leaves spinlab: a module for each export, with `check` and `write` (`base.Export`)."""
