"""What rotations were learned for, kept with them, and compared with what they are used with."""

import logging
from typing import Any

from spinlab.config import Config, LearnConfig, plain
from spinlab.rotation.ranges import formats_of
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)

# whether rotations for a method are learned with rounded weights
_ROUNDED = {"rtn": True, "lwc": True, "gptq": False}


def training_of(config: Config) -> dict[str, Any]:
    """Return what a file of learned rotations says about their training: settings and formats."""
    bits = config.quant.weights.bits if config.learn.quantize_weights else 16
    formats = {"activations": plain(config.quant.activations), "kv": plain(config.kv)}
    trained = {"weights_bits": bits, **formats, "formats": formats_of(config.quant, config.kv)}
    return {"learn": plain(config.learn), "trained": trained}


def warn_of_mismatch(rotations: RotationSet, method: str) -> None:
    """Say so where rotations were learned for another weight quantizer than they are used with.

    SpinQuant's rule: learn with 16-bit weights for GPTQ, with quantized ones for RTN; learned
    clipping rounds to nearest too. GPTAQ and Qronos were published with either.
    """
    trained = (rotations.about or {}).get("trained")
    if trained is None or method not in _ROUNDED:
        return
    rounded = trained["weights_bits"] < 16
    if rounded != _ROUNDED[method]:
        log.warning(
            "the rotations were learned with %s-bit weights in the loop and are used with "
            "weights=%s: the published recipe learns with 16-bit weights for GPTQ, with "
            "quantized ones for RTN",
            trained["weights_bits"],
            method,
        )


def announce_further(start: RotationSet, learn: LearnConfig, name: str) -> None:
    """Say what learning starts from where a file of that name brought the rotations."""
    steps = (start.about or {}).get("learn", {}).get("steps")
    before = "" if steps is None else f", which was learned for {steps} steps"
    rest = ""
    if start.weight_clips and not learn.lr.clip:
        rest = "; learn.lr.clip=0 leaves weight ranges to the clip search, its own are dropped"
    log.info("%-12s further from %s%s%s", "learn", name, before, rest)
