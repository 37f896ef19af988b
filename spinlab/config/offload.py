"""What a network in parts cannot do: it is never there as a whole."""

from spinlab.config.eval import EvalConfig
from spinlab.config.model import ModelConfig
from spinlab.config.outputs import ExportConfig
from spinlab.errors import InputError

_BY_LAYER = ("rotations", "artefact")  # exports that are written from a file, or layer by layer


def check_offload(model: ModelConfig, measured: EvalConfig, export: ExportConfig) -> None:
    """Raise InputError naming the first setting that `runtime.offload` does not go with."""
    whole = {
        "eval.continued": ("eval.continued=0", measured.continued),
        "eval.attention": ("eval.attention=0", measured.attention),
        **{f"export.{n}": (f"export.{n}=null", n not in _BY_LAYER) for n in export.targets},
        "model.weights=random": ("model.path", model.weights == "random"),
    }
    for name, (cure, asked) in whole.items():
        if asked:
            raise InputError(
                f"{name} takes the whole network at once, and with runtime.offload=true it comes "
                f"layer by layer: set {cure}, or runtime.offload=false"
            )
