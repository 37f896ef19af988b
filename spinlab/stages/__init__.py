"""The stages of an experiment, one module each; `pipeline` is their order."""
