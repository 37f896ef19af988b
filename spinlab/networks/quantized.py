"""Networks with rotations and rounded weights: on integer kernels, emulated, and dequantized."""

from collections.abc import Collection, Mapping

from transformers import PreTrainedModel

from spinlab.fakequant.peaks import check_peaks
from spinlab.kv.bits import CONTEXT, cache_bits
from spinlab.kv.cache import attach_kv, kv_path_of
from spinlab.model.modules import linears_of, map_of
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.choice import run_on_integers
from spinlab.runtime.fused.convert import slot_layout
from spinlab.runtime.quantized import Quantized
from spinlab.runtime.stock.insert import insert_integer_linears
from spinlab.weights.ends import with_tied, write_ends
from spinlab.weights.quantized import QuantizedWeight, dequantize_in_calls


class QuantizedNetworks(RotatedNetworks):
    """Assemble networks that compute with rounded weights, one by linear."""

    def emulated(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        """Return the quantized network in floating point, with the integer kernels' rounding.

        Products of levels are exact in floats too, so this is bit for bit what integers give. A
        product of dequantized floats is the same function only up to float noise, which flips
        levels here and there; every flip makes more of them, and after thirty layers two such
        networks are independent samples of the rounding noise.
        """
        model = self._bare(rotations, weights)
        parts = self.parts(model, rotations, weights)
        attach_kv(model, parts.kv, store=False)  # before linears hold their biases together
        insert_integer_linears(model, parts, "torch")
        return model

    def integer(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight], backend: str
    ) -> PreTrainedModel:
        """Return the quantized network on integer kernels, with a packed KV cache."""
        model = self._bare(rotations, weights)
        run_on_integers(model, self.parts(model, rotations, weights), backend)
        return model

    def dequantized(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        """Return the quantized network as learning sees it: products of dequantized floats.

        A linear holds its floats only while it computes.
        """
        model = self._bare(rotations, weights)
        write_ends(model, weights, self.quant)
        self._fake_quant(model, rotations)
        for site, linear in linears_of(model):
            if site.path in weights:
                dequantize_in_calls(linear, weights[site.path])
        return model

    def fused(
        self, rotations: RotationSet, replaced: Collection[str] | Mapping[str, QuantizedWeight] = ()
    ) -> PreTrainedModel:
        """Do what rotated networks do; a tied matrix among the weights is there from the start."""
        original = self.original
        if isinstance(replaced, Mapping):
            original = with_tied(original, replaced, self.quant)
        return RotatedNetworks(original, self.quant, self.kv, self.seed).fused(rotations, replaced)

    def parts(
        self,
        model: PreTrainedModel,
        rotations: RotationSet,
        weights: Mapping[str, QuantizedWeight],
    ) -> Quantized:
        """Return what a rotated model becomes a quantized network with."""
        return Quantized(rotations, weights, self.quant, self.kv_path(model, rotations))

    def _bare(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        """Return the rotated model whose linears are about to take these weights."""
        model = self.fused(rotations, weights)
        check_peaks(map_of(model), rotations, self.quant)
        return model


def bits_of_cache(model: PreTrainedModel, tokens: int = CONTEXT) -> float:
    """Return the stored bits per cached number of a quantized network, as its runtime keeps them.

    Where nothing is stored it is what the codecs of its round trip would take, of a sequence of so
    many tokens.
    """
    layout = slot_layout(model)
    if layout is not None:
        return layout.bits(tokens)
    return cache_bits(kv_path_of(model), map_of(model).dimensions, tokens)
