"""Stage `layers`: how far quantization takes the residual stream from the original's, by layer."""

import gc
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinlab.files import write_json
from spinlab.finite import check_finite
from spinlab.learn.teacher import layer_states
from spinlab.stages.original import Original
from spinlab.stages.rotations import gate_ids
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.stages.variant import Variant

_FILE = "layers.json"


def layers(run: Run, original: Original, calibration: Calibration, variant: Variant) -> list[float]:
    """Return the error of what each decoder layer of an emulated variant writes, as a stage.

    On the window of the gates: the stream is rotated back, and the error of a token is relative
    to the original's norm there (`stream_errors`).
    """

    def work(out: Path) -> None:
        ids = gate_ids(original, calibration).to(run.device)
        expected = layer_states(original.load(), ids)
        gc.collect()  # a network in a cycle would stand beside the next
        model, _ = variant.assemble(run, original)
        r1 = variant.parts(run)[0].r1
        found = stream_errors(model, expected, r1, ids)
        check_finite({"error": torch.tensor(found)}, "the stream of a quantized network")
        write_json(out / _FILE, found)

    depends = [*variant.depends(run, original), calibration.key]
    made = run.cache.run(f"layers-{variant.name}", depends, work)
    return json.loads((made.path / _FILE).read_text())


def stream_errors(
    model: PreTrainedModel, expected: list[torch.Tensor], r1: torch.Tensor | None, ids: torch.Tensor
) -> list[float]:
    """Return, for every decoder layer, the root mean square over tokens of |x' R1ᵀ - x| / |x|.

    x' (1, tokens, hidden) is what the layer of the rotated network writes for `ids` (1, tokens), x
    what the original's does: expected[layer + 1], as `layer_states` gives it.
    """
    found = []
    for state, x in zip(layer_states(model, ids)[1:], expected[1:], strict=True):
        back = state.double() if r1 is None else state.double() @ r1.to(state.device).mT
        error = (back - x.double()).norm(dim=-1) / x.double().norm(dim=-1)
        found.append(error.square().mean().sqrt().item())
    return found
