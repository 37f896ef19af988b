"""The stages of a run, in the order of the pipeline: run, rotate, learn, weights, measure."""
