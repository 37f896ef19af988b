"""What every stage is given: the settings, the cache, the place to compute, and random streams."""

import hashlib
from pathlib import Path

import torch

from spinlab.cache import Cache
from spinlab.config import Config
from spinlab.device import choose_backend, choose_device


class Run:
    """Hold what the stages of one experiment share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = Cache(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)
        self.backend = choose_backend(config.runtime.backend, self.device)

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream per purpose."""
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
