"""Which runtime a quantized network runs on."""

import logging

from transformers import PreTrainedModel

from spinlab.kv.cache import attach_kv
from spinlab.model.modules import map_of
from spinlab.runtime.fused.convert import integer_runtime, why_not_runtime
from spinlab.runtime.fused.operations import triton_operations
from spinlab.runtime.quantized import Quantized
from spinlab.runtime.stock.insert import insert_integer_linears

log = logging.getLogger(__name__)


def run_on_integers(model: PreTrainedModel, parts: Quantized, backend: str) -> None:
    """Make a rotated model multiply integers, with a packed KV cache, in place.

    Linears that have a weight among the parts lose their own. The `triton` back end is a runtime of
    its own, made of fused GPU kernels; `auto` takes it for the models that it runs, and the exact
    product for others, with a warning.
    """
    if backend == "auto":
        reason = why_not_runtime(model, parts.kv)
        if reason is not None and map_of(model).has_ends:  # of a network in parts, not for each
            log.warning("%s: linears multiply by the exact product, one by one", reason)
        backend = "triton" if reason is None else "torch"
    if backend == "triton":
        integer_runtime(model, parts, triton_operations())
        return
    attach_kv(model, parts.kv, store=True)  # before linears hold their biases together
    insert_integer_linears(model, parts, backend)
