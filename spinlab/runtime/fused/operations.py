"""The operations that a runtime is made of, bundled: their definitions, or Triton kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spinlab.fakequant.activations import Transform
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.kernels.attention import reference as attention
from spinlab.runtime.kernels.formats import TokenLevels
from spinlab.runtime.kernels.kv import reference as kv
from spinlab.runtime.kernels.linear import reference as linear
from spinlab.runtime.kernels.producers import reference as producers


@dataclass(frozen=True)
class Operations:
    """Hold one implementation of every operation; each `reference` defines one.

    on_device: nothing is read back by the host, so that a CUDA graph can hold a whole step
    biased: `attend` takes what biases of keys add to scores (`spinlab.kv.bias.BiasScores`)
    """

    name: str
    on_device: bool
    biased: bool
    linear: Callable[..., torch.Tensor]
    linear16: Callable[..., torch.Tensor]
    quantize: Callable[..., TokenLevels]
    norm_quantize: Callable[..., TokenLevels]
    gate_quantize: Callable[..., TokenLevels]
    rotate_quantize: Callable[..., TokenLevels]
    store: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    attend: Callable[..., torch.Tensor]
    # whether what quantizes takes inputs such as these, with what turns them
    rotates: Callable[[torch.Tensor, Transform | None, TokenQuantizer], bool]
    why_not: Callable[[int, int, int], str | None]  # a weight (in, out, blocks) has no kernel


def _any(*what: object) -> bool:
    return True


def _nothing(width: int, out_features: int, blocks: int) -> str | None:
    return None


def _bundle(
    name: str, linear: Any, producers: Any, kv: Any, attention: Any, **how: Any
) -> Operations:
    """Take every operation from the module that holds it; both folders of kernels have the same."""
    return Operations(
        name=name,
        linear=linear.linear,
        linear16=linear.linear16,
        quantize=producers.quantize,
        norm_quantize=producers.norm_quantize,
        gate_quantize=producers.gate_quantize,
        rotate_quantize=producers.rotate_quantize,
        store=kv.store,
        attend=attention.attend,
        **how,
    )


REFERENCE = _bundle(
    "reference",
    linear,
    producers,
    kv,
    attention,
    on_device=False,
    biased=True,
    rotates=_any,
    why_not=_nothing,
)


def triton_operations() -> Operations:
    """Return the kernels in Triton, which is imported where the first of them is launched."""
    from spinlab.runtime.kernels.attention import launch as attention
    from spinlab.runtime.kernels.kv import launch as kv
    from spinlab.runtime.kernels.linear import launch as linear
    from spinlab.runtime.kernels.producers import launch as producers

    return _bundle(
        "triton",
        linear,
        producers,
        kv,
        attention,
        on_device=True,
        biased=False,  # the kernel takes them; a whole network on it was not held to the reference
        rotates=producers.has_rotation_kernel,
        why_not=linear.why_not,
    )
