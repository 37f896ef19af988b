"""What every stage is given: the settings, the cache, the place to compute, and random streams."""

from pathlib import Path

import torch

from spinlab.cache import Cache
from spinlab.config import Config
from spinlab.device import choose_backend, choose_device
from spinlab.seeds import stream


class Run:
    """Hold what the stages of one experiment share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = Cache(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)
        self.backend = choose_backend(config.runtime.backend, self.device)

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream per purpose."""
        return stream(self.config.seed, purpose)
