"""A quantized network in a folder: what is in it, and how it becomes a model again.

contents  names of the files, and what the manifest says of the network
read      from a folder to a model on integers, without its floats on the way
"""
