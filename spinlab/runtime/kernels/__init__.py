"""Kernels by operation. In each folder `reference` is the definition in torch: any device and
float dtype, nothing fast; `launch` calls its twin in Triton, for Ampere, Ada and Hopper.
"""
