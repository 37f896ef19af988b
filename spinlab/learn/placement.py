"""Whether a network under learning fits, and what it keeps for its backward pass."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spinlab.config import LearnConfig
from spinlab.errors import InputError
from spinlab.learn.estimate import Estimate
from spinlab.machine import gib, memory_for
from spinlab.model.modules import layers_of


def choose_checkpoint(estimate: Estimate, learn: LearnConfig, device: torch.device) -> bool:
    """Decide whether layers are run again in the backward pass, which saves memory for time.

    `auto` does so only where the device cannot hold the activations without swapping. Raises
    InputError where the run does not fit.
    """
    has = memory_for(device)
    checkpoint = learn.checkpoint == "on"
    if learn.checkpoint == "auto":
        checkpoint = estimate.bytes(False) > memory_for(device, swap=False)
    if estimate.bytes(checkpoint) <= has:
        return checkpoint
    fixes = [f"a smaller learn.sequence_length than {learn.sequence_length}"]
    if learn.micro_batch > 1:
        fixes.insert(0, f"a smaller learn.micro_batch than {learn.micro_batch}")
    if not checkpoint and estimate.bytes(True) <= has:
        fixes.insert(0, "learn.checkpoint=on")
    if learn.quantize_weights:
        fixes.append("learn.quantize_weights=false")
    fixes.append("more processes")
    raise InputError(
        f"learning needs about {gib(estimate.bytes(checkpoint))} GiB with learn.checkpoint="
        f"{'on' if checkpoint else 'off'}, and {device} has {gib(has)} for it: use "
        f"{', '.join(fixes[:-1])} or {fixes[-1]}"
    )


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of decoder layers for the backward pass, and run them once more there.

    transformers' own switch would take the cache away from the layers, and with it the codecs.
    """
    for layer in layers_of(model):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
