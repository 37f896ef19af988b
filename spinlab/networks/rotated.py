"""Networks with rotations before weights are rounded, and the one that is learned on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from spinlab.config import KVConfig, QuantConfig
from spinlab.fakequant.insert import insert_fake_quant
from spinlab.kv.cache import attach_kv, kv_path
from spinlab.rotation.fuse import fold_norms, fuse, fuse_inputs, fuse_stream
from spinlab.rotation.rotations import RotationSet


@dataclass(frozen=True)
class RotatedNetworks:
    """Assemble networks from fresh copies of one original, with one set of formats."""

    original: Callable[[], PreTrainedModel]
    quant: QuantConfig
    kv: KVConfig

    def fused(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model with nothing online: weights as quantizers want them."""
        model = self.original()
        fold_norms(model)
        fuse(model, rotations)
        return model

    def stream_rotated(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model without what runs online: the original's function as it is."""
        model = self.original()
        fold_norms(model)
        fuse_stream(model, rotations)
        return model

    def rotated(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model with R3 and R4 online and nothing quantized."""
        model = self.fused(rotations)
        insert_fake_quant(model, rotations, None)
        attach_kv(model, kv_path(model, rotations.r3, None), store=False)
        return model

    def learnable(self, rotations: RotationSet, inputs: bool = False) -> PreTrainedModel:
        """Return the network that rotations are learned on.

        R1 and R2 are not fused, the rest is; with `inputs` those of single inputs are left out too.
        """
        if inputs:
            rotations = replace(rotations, inputs={})
        model = self.original()
        fold_norms(model)
        fuse_inputs(model, rotations)
        self._fake_quant(model, rotations)
        return model

    def _fake_quant(self, model: PreTrainedModel, rotations: RotationSet) -> None:
        insert_fake_quant(model, rotations, self.quant)
        attach_kv(model, kv_path(model, rotations.r3, self.kv), store=False)
