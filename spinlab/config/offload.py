"""What a network in parts cannot do: it is never there as a whole."""

from spinlab.config.eval import EvalConfig
from spinlab.config.model import ModelConfig
from spinlab.config.outputs import ExportConfig
from spinlab.errors import InputError


def check_offload(model: ModelConfig, measured: EvalConfig, export: ExportConfig) -> None:
    """Raise InputError naming the first setting that `runtime.offload` does not go with."""
    whole = {
        "eval.continued": ("eval.continued=0", measured.continued),
        "eval.attention": ("eval.attention=0", measured.attention),
        **{f"export.{n}": (f"export.{n}=null", path) for n, path in export.targets.items()},
        "model.weights=random": ("model.path", model.weights == "random"),
    }
    for name in ("rotations", "artefact"):  # written from a file, and layer by layer
        whole.pop(f"export.{name}", None)
    for name, (cure, asked) in whole.items():
        if asked:
            raise InputError(
                f"{name} takes the whole network at once, and with runtime.offload=true it comes "
                f"layer by layer: set {cure}, or runtime.offload=false"
            )
