"""The form of a method's rotations, for what its network costs online: no value is learned."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from spinlab.config import Config
from spinlab.config.rotation import BlocksConfig
from spinlab.model.map import ModelMap
from spinlab.rotation.duquant import DualTransform, largest_block
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.kinds import KINDS
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet


def hadamards(model_map: ModelMap) -> RotationSet:
    """Return R3 and R4, as QuaRot's and SpinQuant's networks have them online."""
    r3, r4 = (hadamard_rotation(model_map.width(name)) for name in ("r3", "r4"))
    return RotationSet(r3=r3, r4=r4)


def random_rotations(config: Config, model_map: ModelMap) -> RotationSet:
    """Draw what a method's network runs online: R3, R4, across heads, and transforms of inputs.

    What is fused, R1, R2 and scales that fold, costs nothing and is left out. A learned dual
    transform has rotations of its own for each block, a searched one shares one; WUSH's blocks cost
    what rotations of their size do.
    """
    generator, rotation = torch.Generator().manual_seed(0), config.rotation
    dual = rotation.inputs == "duquant"
    plain = replace(
        rotation, r1="none", r2="none", smooth=None, inputs="none" if dual else rotation.inputs
    )
    if rotation.inputs == "wush":
        plain = replace(plain, inputs="blocks", blocks=BlocksConfig(rotation.wush.size))
    found = initial_rotations(plain, model_map, generator)
    inputs = dict(found.inputs)
    if dual:
        own = "inputs" in config.learn.rotations and config.learn.steps > 0
        inputs |= _duals(model_map, rotation.duquant.block_size, own, generator)
    groups = rotation.smooth_groups if rotation.smooth is not None else ()
    for input in (i for i in model_map.inputs if i.kind in groups and not i.folds):
        scale = 0.5 + torch.rand(input.width, generator=generator, dtype=torch.float64)
        turn = inputs[input.key].dual if input.key in inputs else None
        inputs[input.key] = ScaledDual(scale, folded=False, dual=turn)
    rounded = bool(rotation.rounds_factors)
    inputs = {key: replace(own, rounded=rounded) for key, own in inputs.items()}
    return replace(found, inputs=inputs)


def _duals(
    model_map: ModelMap, size: int, own: bool, generator: torch.Generator
) -> Iterator[tuple[str, ScaledDual]]:
    draw = KINDS["random"]
    for input in model_map.inputs:
        block = largest_block(input.width, size)
        count = input.width // block if own else 1
        order = torch.randperm(input.width, generator=generator)
        first, second = (
            torch.stack([draw(block, generator, "inputs") for _ in range(count)]) for _ in range(2)
        )
        yield input.key, ScaledDual(dual=DualTransform(first, order, second))
