"""Where a network under learning keeps its weights and activations."""

from functools import partial

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.model.modules import decoder_of, layers_of


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of decoder layers for the backward pass, and run them once more there.

    transformers' own switch would take the cache away from the layers, and with it the codecs.
    """
    for layer in layers_of(model):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def shard_layers(model: PreTrainedModel) -> None:
    """Spread frozen weights over all processes; a layer is gathered while it computes (FSDP2).

    The head stays whole: the loss multiplies with it chunk by chunk.
    """
    if parallel.world() == 1:
        return
    mesh = init_device_mesh(model.device.type, (parallel.world(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder_of(model), mesh=mesh)
