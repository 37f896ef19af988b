"""How tokens are chosen, as the options of the command say it."""

from dataclasses import dataclass
from typing import Any

from spinlab.errors import InputError

_SEEDS = 2**64  # which torch tells apart


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are chosen: temperature 0 takes the likeliest, top_p the likeliest share."""

    new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p} must lie above 0 and at most at 1")
        if not 0 <= self.seed < _SEEDS:
            raise InputError(f"--seed {self.seed} is out of range: it goes from 0 to {_SEEDS - 1}")

    @property
    def words(self) -> dict[str, Any]:
        """What transformers' settings of a generation say of it; the others keep their defaults."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
