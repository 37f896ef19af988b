"""Networks with rotations before weights are rounded, and the one that is learned on."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from spinlab.config import KVConfig, QuantConfig
from spinlab.fakequant.insert import insert_fake_quant
from spinlab.kv.cache import attach_kv
from spinlab.kv.path import KVPath, kv_path
from spinlab.model.load import exact_norms
from spinlab.model.modules import map_of
from spinlab.rotation.fuse import (
    fold_norms,
    fuse,
    fuse_inputs,
    fuse_latents,
    fuse_stream,
    untie,
)
from spinlab.rotation.rotations import RotationSet


@dataclass(frozen=True)
class RotatedNetworks:
    """Assemble networks from fresh copies of one original, with one set of formats.

    Gains of norms are folded or kept as rotations have them. seed: of the run, for what codecs of
    the KV cache draw.
    """

    original: Callable[[], PreTrainedModel]
    quant: QuantConfig
    kv: KVConfig
    seed: int = 0

    def fused(self, rotations: RotationSet, replaced: Collection[str] = ()) -> PreTrainedModel:
        """Return the rotated model with nothing online: weights as quantizers want them.

        replaced: linears that are about to take other weights (`spinlab.rotation.fuse.fold_norms`).
        """
        model = self._ready(rotations, replaced)
        fuse(model, rotations, replaced)
        return model

    def stream_rotated(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model without what runs online: the original's function as it is."""
        model = self._ready(rotations)
        fuse_stream(model, rotations)
        return model

    def rotated(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model with R3 and R4 online and nothing quantized.

        Biases of keys are apart where they can be, so that a gate sees that they come back.
        """
        model = self.fused(rotations)
        insert_fake_quant(model, rotations, None)
        attach_kv(model, KVPath(rotations.r3, apart=True), store=False)
        return model

    def learnable(self, rotations: RotationSet, inputs: bool = False) -> PreTrainedModel:
        """Return the network that rotations are learned on.

        R1 and R2 are not fused, the rest is; with `inputs` no transform is in the weights of those
        linears whose input has one of its own, and no scale in what produces it.
        """
        model = self._ready(rotations)
        fuse_latents(model, rotations)
        own = rotations.inputs if inputs else {}
        there = [site.path for site in map_of(model).sites if site.key in own]
        fuse_inputs(model, replace(rotations, inputs={}) if inputs else rotations, there)
        self._fake_quant(model, rotations)
        exact_norms(model)  # one kernel each, where transformers' take six
        return model

    def kv_path(self, model: PreTrainedModel, rotations: RotationSet) -> KVPath:
        """Return what a quantized model's keys, values and queries go through."""
        described = map_of(model)
        widths, names = described.coded_widths, described.attentions
        return kv_path(self.kv, widths, rotations.r3, self.seed, names, rotations.kv_clips)

    def _ready(self, rotations: RotationSet, replaced: Collection[str] = ()) -> PreTrainedModel:
        """Return the original with its norms as rotations have them, its ends untied."""
        model = self.original()
        if rotations.keeps_gains:
            untie(model)
        else:
            fold_norms(model, replaced)
        return model

    def _fake_quant(self, model: PreTrainedModel, rotations: RotationSet) -> None:
        insert_fake_quant(model, rotations, self.quant)
        attach_kv(model, self.kv_path(model, rotations), store=False)
