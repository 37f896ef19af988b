"""The interface between the loop and a network under learning: what R acts on is its own."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from spinlab.config import ClipSearch, LearnConfig, ObjectiveConfig, QuantConfig
from spinlab.learn.learned import LearnedRotations
from spinlab.learn.objectives import head_loss
from spinlab.learn.spaces.local import LocalTerms
from spinlab.learn.spaces.owners import LearnedLinears
from spinlab.model.modules import head_of, map_of

CHUNK = {"cpu": 256, "cuda": 2048}  # tokens whose logits exist at once


@dataclass(frozen=True)
class Parts:
    """What a space is made of: the network, what is learned, and the settings."""

    model: PreTrainedModel
    rotations: LearnedRotations
    local: LocalTerms
    learn: LearnConfig
    quant: QuantConfig
    search: ClipSearch  # of ranges that are not learned, and where learned ones start
    clips: Mapping[str, torch.Tensor]  # ratios that learned weight ranges start from, by linear
    linears: LearnedLinears | None = None  # of rounded weights, if they are taken already


class LearningSpace:
    """Do what a step needs before and after its passes; by default nothing.

    Subclasses put the rotations on activations (`ActivationSpace`) or on weights (`WeightSpace`).
    """

    def __init__(self, parts: Parts) -> None:
        """Put the rotations of these parts into their model."""
        self.rotations, self.learn = parts.rotations, parts.learn
        self.head_bias, self.logit_cap = head_of(parts.model).bias, map_of(parts.model).logit_cap

    @classmethod
    def check(cls, learn: LearnConfig) -> None:
        """Raise InputError for what cannot be learned in this space."""

    def begin(self, index: int) -> None:
        """Prepare the network for step `index`, with the rotations as they stand."""

    def after_backward(self) -> None:
        """Take in the gradients of one micro-batch of several."""

    def collect(self) -> None:
        """Hand the rotations what gradients they have not got yet."""

    def step(self, rate: float) -> None:
        """Move what is learned beside the rotations, at `rate` times its base rate."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Take the original's residual stream (..., hidden) to this network's."""
        return x

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Take this network's residual stream (..., hidden) to the original's."""
        return x

    def head_loss(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        ids: torch.Tensor,
        objective: ObjectiveConfig,
        teacher: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss on next-token logits and its terms.

        hidden: (batch, tokens, hidden); head: (vocabulary, hidden); ids: (batch, tokens). teacher:
        the original's hidden states and head, for terms that compare with them.
        """
        chunk, heads = CHUNK[ids.device.type], (self.head_bias, self.logit_cap)
        return head_loss(hidden, head, ids, objective, teacher, chunk, *heads)

    def clips(self) -> dict[str, torch.Tensor]:
        """Return learned clip ratios by linear."""
        return {}

    def input_clips(self) -> dict[str, float]:
        """Return learned clip ratios of inputs, by their keys."""
        return {}

    def kv_clips(self) -> dict[str, float]:
        """Return learned clip ratios of keys and values, by layer and side."""
        return {}

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return what is learned beside the rotations and belongs to their file, as it stands."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs beside the rotations."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
