"""Settings of the model."""

from dataclasses import dataclass, field
from typing import Any

from spinlab.errors import InputError
from spinlab.limits import choice


@dataclass(frozen=True)
class ModelConfig:
    """Say which weights are loaded: a local `path`, else packaged GGUF, else a hub `hub` id."""

    name: str = "toy"
    path: str | None = None  # local folder with config.json and safetensors; beats the other two
    package: str | None = None  # installed distribution that carries `file`, a GGUF checkpoint
    file: str | None = None
    hub: str | None = None
    revision: str = "main"
    weights: str = "random"  # pretrained, or random: `architecture` with seeded weights
    # fields of the family's config, `model_type` (llama unless given) among them
    architecture: dict[str, Any] = field(default_factory=dict)
    outlier_channels: int = 0  # random weights: residual channels scaled up, as real models have
    outlier_scale: float = 30.0
    dtype: str = "float32"  # what the networks run in; fusing is always float64

    def __post_init__(self) -> None:
        choice("model.weights", self.weights, ("pretrained", "random"))
        choice("model.dtype", self.dtype, ("float32", "float64", "bfloat16"))
        if self.weights == "pretrained" and not (self.path or self.package or self.hub):
            raise InputError("no model is named: set model.path, model.hub or model.package")
        if self.hub and self.package and not self.path:
            raise InputError(
                f"model.hub={self.hub} and model.package={self.package} name two models: "
                "set one of them to null"
            )
