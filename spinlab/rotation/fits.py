"""Whether settings of rotations fit a family and the widths of a model."""

from spinlab.config import RotationConfig
from spinlab.config.checks import choice
from spinlab.config.rotation import SEARCHED
from spinlab.errors import InputError
from spinlab.model.map import ModelMap
from spinlab.rotation.kinds import KINDS

# what mixes the channels of an input, by what it reads
_MIXED_BY = {
    **{"R1": ("r1",), "R2": ("cross_head", "r2")},
    **dict.fromkeys(("q_latent", "kv_latent"), ("latents",)),
}


def check_rotations(config: RotationConfig, model_map: ModelMap) -> None:
    """Raise InputError for an unknown kind, or where settings do not fit family and widths."""
    for name, searched in (("r1", SEARCHED), ("r2", SEARCHED), ("r3", ()), ("r4", ())):
        choice(f"rotation.{name}", getattr(config, name), ("none", *KINDS, *searched))
    choice("rotation.latents", config.latents, ("none", *KINDS))
    if config.latents != "none" and not model_map.latents:
        raise InputError(
            f"rotation.latents={config.latents} turns latents that heads are made of, and a "
            f"{model_map.family} model has none: set rotation.latents=none"
        )
    choice("rotation.blocks.kind", config.blocks.kind, tuple(KINDS))
    for name in config.used:
        model_map.check(name)
        if name != "r4" or not model_map.gated_widths:  # each width has an R4 of its own
            model_map.width(name)
    for width in model_map.gated_widths if config.r4_block and "r4" in config.used else ():
        if width % config.r4_block:
            raise InputError(
                f"rotation.r4_block={config.r4_block} does not divide {width}, the R4 width"
            )
    if config.r1_block and "r1" in config.used and model_map.width("r1") % config.r1_block:
        raise InputError(
            f"rotation.r1_block={config.r1_block} does not divide {model_map.width('r1')}, the R1 "
            "width"
        )
    if config.smooth is not None:
        _check_smoothing(config, model_map)
    if config.scales_inputs and not config.online:
        for input in (input for input in model_map.inputs if input.producer is None):
            raise InputError(
                f"rotation.inputs=scales runs online before the {input.name} input of a "
                f"{model_map.family} model, which has no norm of its own: set rotation.online=true"
            )


def _check_smoothing(config: RotationConfig, model_map: ModelMap) -> None:
    """Refuse scales of inputs that a rotation mixes, or that nothing could carry offline."""
    names = tuple({input.kind: None for input in model_map.inputs})
    for name in config.smooth_groups:
        choice("rotation.smooth_groups", name, names)
    for input in (i for i in model_map.inputs if i.kind in config.smooth_groups):
        for rotation in _MIXED_BY.get(input.reads or "", ()):
            if getattr(config, rotation) != "none":
                raise InputError(
                    f"rotation.smooth scales single channels of the {input.name} input, which "
                    f"rotation.{rotation} mixes: set rotation.{rotation}=none"
                )
        if not input.folds and not config.online:
            own = "without a norm or linear of its own there"
            why = "with grouped queries" if input.producer else own
            raise InputError(
                f"rotation.smooth of the {input.name} input runs online on a model {why}: take "
                f"{input.name} out of rotation.smooth_groups, or set rotation.online=true"
            )
