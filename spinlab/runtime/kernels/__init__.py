"""Kernels by operation. In each folder `reference` is the definition in torch: any device and
float dtype, nothing fast; `launch` calls its twin in Triton, for Ampere, Ada and Hopper. Products
of unpacked bytes (`matmul`) have several back ends: `reference` defines one of a block, and
`groups` what blocks add up to.
"""
