"""Read an exported compressed-tensors folder back, as its readers would."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinlab.export.packing import TRANSFORM
from spinlab.model.files import CONFIG, read_json, weights_of


def load_served(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load by transformers, and apply the online transform that it leaves out.

    The package's own functions turn inputs, in float32. Weights that are floats of 4 bits it gives
    in bfloat16, which holds them, whatever the dtype: they are brought to that of the model.
    """
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=dtype, local_files_only=True)
    stored = read_json(folder / CONFIG)["quantization_config"]
    if "fp4" in stored["format"]:
        _decompress(model, dtype)
    said = stored.get("transform_config")
    if said is None:
        return model
    apply_transform_config(model, TransformConfig.model_validate(said))
    for path in weights_of(str(folder), folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(f".{TRANSFORM}_input.weight"):  # which all linears share
                    model.get_parameter(name).data = file.get_tensor(name).float()
    return model


def _decompress(model: Any, dtype: torch.dtype) -> None:
    """Take weights out of their bytes at once, which else the first call does."""
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight.data = module.weight.data.to(dtype)
