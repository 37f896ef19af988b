"""How a network under learning fits: weights in shards, layers that are run again."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import LearnConfig, QuantConfig
from spinlab.errors import InputError
from spinlab.learn.estimate import Estimate, estimate_of
from spinlab.machine import gib, memory_for
from spinlab.model.modules import layers_of


def choose_shards(
    model: PreTrainedModel,
    learn: LearnConfig,
    quant: QuantConfig,
    processes: int,
    device: torch.device,
) -> Estimate:
    """Return what learning takes, with weights spread over processes as learn.shard says.

    `auto` spreads rounded weights only where one of the devices cannot hold whole ones without
    swapping: those need no gathering. Only the model's shapes and dtype are looked at.
    """
    parts, again = (model, learn, quant, processes, device), learn.checkpoint != "off"
    as_set = estimate_of(*parts)
    if learn.shard != "auto" or as_set.shards or processes == 1:
        return as_set
    short = torch.tensor(float(as_set.bytes(again) > memory_for(device, swap=False)))
    if not parallel.sum_(short):
        return as_set
    spread = estimate_of(*parts, shards=True)  # of few layers those that are gathered are most
    return min(as_set, spread, key=lambda found: found.bytes(again))


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
    if learn.shard == "off" and parallel.world() > 1:
        fixes.append("learn.shard=auto")
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
