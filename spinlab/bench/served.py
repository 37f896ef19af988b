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

    The package's own functions turn inputs, in float32.
    """
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=dtype, local_files_only=True)
    said = read_json(folder / CONFIG)["quantization_config"].get("transform_config")
    if said is None:
        return model
    apply_transform_config(model, TransformConfig.model_validate(said))
    for path in weights_of(str(folder), folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(f".{TRANSFORM}_input.weight"):  # which all linears share
                    model.get_parameter(name).data = file.get_tensor(name).float()
    return model
