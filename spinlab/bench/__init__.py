"""Benchmarks of single methods at full size: random weights, records in experiments/bench/.

They need torch and transformers only, so that they run on a bare GPU node.
"""
