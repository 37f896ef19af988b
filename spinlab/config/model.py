"""Settings of the model."""

from dataclasses import dataclass, field
from typing import Any

from spinlab.config.checks import at_least, choice, positive
from spinlab.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Say which weights are loaded: a local `path`, else one of a package, else a `hub` id."""

    name: str = "toy"
    path: str | None = None  # local folder with config.json and safetensors; beats the other two
    # installed distribution that carries `file`: a GGUF, or the folder of a checkpoint
    package: str | None = None
    file: str | None = None
    hub: str | None = None
    revision: str = "main"
    # pretrained, random (`architecture` with seeded weights), or auto: random if no model is named
    weights: str = "auto"
    # fields of the family's config, `model_type` (llama unless given) among them
    architecture: dict[str, Any] = field(default_factory=dict)
    outlier_channels: int = 0  # random weights: residual channels scaled up, as real models have
    outlier_scale: float = 30.0
    dtype: str = "float32"  # what the networks run in; fusing is always float64

    def __post_init__(self) -> None:
        choice("model.weights", self.weights, ("auto", "pretrained", "random"))
        choice("model.dtype", self.dtype, ("float32", "float64", "bfloat16"))
        at_least("model.outlier_channels", self.outlier_channels, 0)
        positive("model.outlier_scale", self.outlier_scale)
        named = self.path or self.package or self.hub
        if self.weights == "pretrained" and not named:
            raise InputError("no model is named: set model.path, model.hub or model.package")
        if self.weights == "random" and self.path:
            raise InputError(
                f"model.path={self.path} and model.weights=random name two models: set "
                "model.weights=pretrained, or model.path=null"
            )
        if self.weights == "auto":
            object.__setattr__(self, "weights", "pretrained" if named else "random")
        if self.hub and self.package and not self.path:
            raise InputError(
                f"model.hub={self.hub} and model.package={self.package} name two models: "
                "set one of them to null"
            )
        if self.package and not self.path and self.weights == "pretrained" and not self.file:
            raise InputError(
                f"model.package={self.package} needs model.file, its GGUF or checkpoint folder"
            )

    @property
    def is_gguf(self) -> bool:
        """Tell whether the weights are the GGUF of a package, converted before they are loaded."""
        from_package = self.weights == "pretrained" and self.package and not self.path
        return bool(from_package) and str(self.file).endswith(".gguf")
