"""The kernels in Triton, for Ampere, Ada and Hopper. Each module is the twin of one in `reference`.

Triton itself is imported where a kernel is launched, so that machines without it can read this.
"""
