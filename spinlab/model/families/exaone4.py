"""EXAONE-4: norms behind both blocks, as in OLMo-2, and norms of single heads.

Where the config has a window, the layers that slide have RoPE, and the others see everything.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from spinlab.model.families.decoder import POST_NORM, read_decoder
from spinlab.model.families.olmo2 import NAMES
from spinlab.model.layer import Layer
from spinlab.model.map import Family, ModelMap


def _read(model: PreTrainedModel) -> ModelMap:
    found = read_decoder(model, NAMES, cannot={"r1": POST_NORM})
    return replace(found, layers=tuple(_reaching(model, layer) for layer in found.layers))


def _reaching(model: PreTrainedModel, layer: Layer) -> Layer:
    """Return a layer with the window and the RoPE that it has itself."""
    stock: Any = model.get_submodule(layer.attention.path)
    window = stock.sliding_window if stock.is_sliding else None
    rope = stock.is_sliding or stock.sliding_window is None
    return replace(layer, attention=replace(layer.attention, window=window, rope=rope))


EXAONE4 = Family(_read)
