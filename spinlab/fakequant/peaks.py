"""The largest magnitudes of inputs, for formats with one scale of an input for all tokens."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.config import QuantConfig
from spinlab.errors import InputError
from spinlab.fakequant.insert import FakeQuantLinear, token_quantizer
from spinlab.model.hooks import temporary_hooks
from spinlab.model.map import ModelMap
from spinlab.model.modules import linears_of, map_of
from spinlab.rotation.rotations import RotationSet


@torch.no_grad()
def input_peaks(
    model: PreTrainedModel, windows: torch.Tensor, quant: QuantConfig
) -> dict[str, float]:
    """Return the largest magnitude of every input whose format has it from calibration, by key.

    model: with FakeQuantLinears that round nothing; inputs are seen behind what runs online.
    windows: (samples, length) token ids. NaN or infinite where an input is.
    """
    found: dict[str, torch.Tensor] = {}
    wanted = _calibrated(map_of(model), quant)

    def keeper(key: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            peak = out.abs().amax().double()
            found[key] = torch.maximum(found[key], peak) if key in found else peak

        return keep

    sites = ((s.key, cast(FakeQuantLinear, x)) for s, x in linears_of(model) if s.quantized)
    paths = {key: linear.path for key, linear in sites}  # which linears of one input share
    with temporary_hooks() as hooks:
        for key in wanted:
            hooks.append(paths[key].register_forward_hook(keeper(key)))
        for window in tqdm(windows, desc="peaks", disable=map_of(model).only is not None):
            model(input_ids=window[None].to(model.device), use_cache=False, logits_to_keep=1)
    return {key: peak.item() for key, peak in found.items()}


def check_peaks(model_map: ModelMap, rotations: RotationSet, quant: QuantConfig) -> None:
    """Raise InputError where an input has no range that calibration should have found."""
    lost = _calibrated(model_map, quant) - rotations.peaks.keys()
    if lost:
        raise InputError(
            f"the range of the input {min(lost)} was never found on calibration text, which its "
            "format asks for: use quant.activations.format=nvfp4, or run the experiment again, "
            f"with more {quant.calibration.place}.samples where no token went to an expert"
        )


def _calibrated(model_map: ModelMap, quant: QuantConfig) -> set[str]:
    """Return the keys of inputs whose format has its range from calibration."""
    sites = (site for site in model_map.sites if site.quantized)
    quantizers = ((site.key, token_quantizer(model_map, site, quant)) for site in sites)
    return {key for key, found in quantizers if found is not None and found.format.calibrated}
