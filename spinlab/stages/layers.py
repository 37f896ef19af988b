"""Stage `layers`: how far quantization takes the residual stream from the original's, by layer."""

import gc
import json
from pathlib import Path

import torch

from spinlab.files import write_json
from spinlab.finite import check_finite
from spinlab.learn.teacher import layer_states
from spinlab.model.modules import map_of
from spinlab.model.network import Network, as_it_is
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
        expected = _states(original.network(as_it_is), ids)
        gc.collect()  # a network in a cycle would stand beside the next
        network, _ = variant.network(run, original)
        r1 = variant.parts(run)[0].r1
        found = stream_errors(_states(network, ids), expected, r1)
        check_finite({"error": torch.tensor(found)}, "the stream of a quantized network")
        write_json(out / _FILE, found)

    depends = [*variant.depends(run, original), calibration.key]
    made = run.cache.run(f"layers-{variant.name}", depends, work)
    return json.loads((made.path / _FILE).read_text())


def _states(network: Network, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return what `layer_states` does, of all parts of a network."""
    found: list[torch.Tensor] = []
    for part in network.parts([ids]):
        if map_of(part).there:
            found = [*found[:-1], *(state.cpu() for state in layer_states(part, ids))]
    return found


def stream_errors(
    states: list[torch.Tensor], expected: list[torch.Tensor], r1: torch.Tensor | None
) -> list[float]:
    """Return, for every decoder layer, the root mean square over tokens of |x' R1ᵀ - x| / |x|.

    x' (1, tokens, hidden) is what the layer of the rotated network writes, x what the original's
    does: states[layer + 1] and expected[layer + 1], as `layer_states` gives them for the same ids.
    """
    found = []
    for state, x in zip(states[1:], expected[1:], strict=True):
        back = state.double() if r1 is None else state.double() @ r1.to(state.device).mT
        error = (back - x.double()).norm(dim=-1) / x.double().norm(dim=-1)
        found.append(error.square().mean().sqrt().item())
    return found
