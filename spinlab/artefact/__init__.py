"""A quantized network in a folder (`spinlab.export.artefact`) becomes a model again.

weights  packed weights, read one by one
read     from a folder to a model on integers, without its floats on the way
"""
