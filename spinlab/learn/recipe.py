"""What rotations were learned for, kept with them, and compared with what they are used with."""

import logging
from typing import Any

from spinlab.config import Config, WeightsConfig, plain
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)


def training_of(config: Config) -> dict[str, Any]:
    """Return what a file of learned rotations says about their training."""
    bits = config.quant.weights.bits if config.learn.quantize_weights else 16
    formats = {"activations": plain(config.quant.activations), "kv": plain(config.kv)}
    trained = {"weights_bits": bits, **formats}
    return {"learn": plain(config.learn), "trained": trained}


def warn_of_mismatch(rotations: RotationSet, config: WeightsConfig) -> None:
    """Say so where rotations were learned for another weight quantizer than they are used with.

    SpinQuant's rule: learn with 16-bit weights for GPTQ, with quantized ones for RTN.
    """
    trained = (rotations.about or {}).get("trained")
    if trained is None:
        return
    rounded = trained["weights_bits"] < 16
    if rounded != (config.method == "rtn"):
        log.warning(
            "the rotations were learned with %s-bit weights in the loop and are used with "
            "weights=%s: the published recipe learns with 16-bit weights for GPTQ, with "
            "quantized ones for RTN",
            trained["weights_bits"],
            config.method,
        )
