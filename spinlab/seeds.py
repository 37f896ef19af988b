"""Random streams of a run: one per purpose, all of its seed."""

import hashlib

import torch


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return an independent random stream of a purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
