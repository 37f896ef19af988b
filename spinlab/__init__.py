"""Learned rotations for LLM quantization: rotate, learn, quantize, run on integers, measure."""

__version__ = "0.1.0"
