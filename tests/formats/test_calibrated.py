"""NVFP4 with one scale of an input for all tokens, against its definition in float64."""

import math
from dataclasses import replace

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import ClipSearch, KVConfig
from spinlab.errors import InputError
from spinlab.fakequant.insert import FakeQuantLinear, insert_fake_quant
from spinlab.fakequant.peaks import input_peaks
from spinlab.formats import FORMATS, format_of, name_of, quantizer
from spinlab.formats.integer import nearest
from spinlab.formats.nvfp4 import CalibratedNVFP4
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.model.modules import linears_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.layerwise import quantize_rtn
from tests.formats.test_float_groups import E2M1, nearest_even, random, settings

FORMAT = CalibratedNVFP4(4, True)
PEAK = 37.0
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
QUANT = composed("quant=nvfp4_calibrated").quant


def defined(token: torch.Tensor, peak: float) -> list[float]:
    """Return the numbers of a token, group by group, from float64 and torch's E4M3."""
    tensor = 2.0 ** math.ceil(math.log2(peak / (6 * 448)))
    found: list[float] = []
    for group in token.double().split(16):
        exact = torch.tensor(group.abs().max().item() / 6 / tensor).clamp(max=448)
        scale = exact.float().to(torch.float8_e4m3fn).double().item() * tensor
        signs = group.sign().tolist()
        sizes = (nearest_even(v / scale, E2M1) if scale else 0.0 for v in group.abs().tolist())
        found += [sign * size * scale for sign, size in zip(signs, sizes, strict=True)]
    return found


def test_an_input_is_the_definition_in_float64(monkeypatch):
    monkeypatch.setattr(quantizer, "settled", nearest)
    x = random(40, 64) * 2.0 ** torch.arange(-25, 15)[:, None]
    assert (x.abs().amax(1) > PEAK * 2).any() and (x.abs().amax(1) < PEAK * 2**-19).any()
    found = TokenQuantizer(FORMAT, 16, peak=PEAK).round(x)
    wanted = [defined(token, PEAK) for token in x]
    assert torch.equal(found.double(), torch.tensor(wanted, dtype=torch.float64))
    assert not found[0].any() and x[0].abs().max() > 0


def test_the_largest_input_that_calibration_saw_is_not_clipped():
    for peak in (PEAK, 448 * 6 / 64, 1e-6, 3e4):
        x = torch.tensor([[peak, *[0.0] * 15]])
        found = TokenQuantizer(FORMAT, 16, peak=peak).round(x)
        assert (found[0, 0] / peak - 1).abs() <= 1 / 16
        beyond = TokenQuantizer(FORMAT, 16, peak=peak).round(x * 4)
        assert beyond.max() == 6 * 448 * FORMAT.tensor_scale(torch.tensor(peak)) < 4 * peak


def test_a_token_has_the_numbers_that_it_has_alone_and_an_unknown_input_those_of_nvfp4():
    x, known = random(6, 64), TokenQuantizer(FORMAT, 16, peak=PEAK)
    whole = known.round(x)
    assert torch.equal(whole, torch.stack([known.round(row[None])[0] for row in x]))
    assert not torch.equal(known.round(x * 2**14), whole * 2**14)  # the scale stays
    plain = TokenQuantizer(FORMATS["nvfp4"](4, True), 16)
    assert torch.equal(TokenQuantizer(FORMAT, 16).round(x + 1), plain.round(x + 1))
    assert name_of(FORMAT) == "nvfp4_calibrated" and name_of(FORMATS["nvfp4"](4, True)) == "nvfp4"
    assert format_of(settings("nvfp4_calibrated")) == FORMAT


@torch.no_grad()
def test_peaks_are_those_of_inputs_behind_what_runs_online(make_family_model, ids):
    def original():
        return make_family_model("llama", 0, **SHAPE)

    networks = QuantizedNetworks(original, QUANT, KVConfig())
    rotations = RotationSet(r4=hadamard_rotation(SHAPE["intermediate_size"]))
    rotated = networks.rotated(rotations)
    found = input_peaks(rotated, ids, QUANT)
    seen: dict[str, float] = {}
    for site, linear in linears_of(rotated):
        assert isinstance(linear, FakeQuantLinear)

        def see(module, args, site=site):
            x = args[0]
            if site.reads == "R4":
                x = x @ rotations.r4.dense().to(x.dtype)
            seen[site.key] = max(seen.get(site.key, 0.0), x.abs().max().item())

        linear.register_forward_pre_hook(see)
    rotated(ids)
    assert found.keys() == seen.keys()
    assert found == pytest.approx(seen, rel=1e-5)


def test_a_network_of_such_inputs_needs_their_peaks(make_family_model, ids):
    def original():
        return make_family_model("llama", 0, **SHAPE)

    networks = QuantizedNetworks(original, QUANT, KVConfig())
    rotations = RotationSet()
    weights = quantize_rtn(networks.fused(rotations), QUANT, ClipSearch(), {})
    for make in (networks.emulated, networks.dequantized):
        with pytest.raises(InputError, match=r"the range of the input 0\.\w+ was never found on"):
            make(rotations, weights)
    peaks = input_peaks(networks.rotated(rotations), ids, QUANT)
    known = replace(rotations, peaks=peaks)
    assert networks.emulated(known, weights)(ids).logits.isfinite().all()
    model = networks.fused(known)
    insert_fake_quant(model, known, QUANT)
    for site, linear in linears_of(model):
        assert linear.path.quantizer.peak == peaks[site.key]


@pytest.mark.parametrize("place", ["weights", "head", "embedding", "tied"])
def test_numbers_that_are_known_before_are_refused(place):
    words = "{format: nvfp4_calibrated, bits: 4, symmetric: true, group_size: 16}"
    with pytest.raises(InputError, match=f"quant.{place}.format=nvfp4_calibrated is a format of"):
        composed("+experiment=toy", f"quant.{place}={words}")


def test_every_expert_needs_the_peak_of_its_own_input(make_family_model, ids):
    shape = {**SHAPE, "moe_intermediate_size": 32, "num_experts": 24, "num_experts_per_tok": 1}

    def original():
        return make_family_model("qwen3_moe", 0, **shape)

    networks = QuantizedNetworks(original, QUANT, KVConfig())
    weights = quantize_rtn(networks.fused(RotationSet()), QUANT, ClipSearch(), {})
    peaks = input_peaks(networks.rotated(RotationSet()), ids[:1, :6], QUANT)
    assert {"0.gate_up", "1.gate_up", "0.qkv"} <= peaks.keys()
    downs = [key for key in peaks if ".down." in key]
    assert 0 < len(downs) <= 12  # six tokens, in two layers
    with pytest.raises(InputError, match=r"0\.down\.\d+ .*more quant\.calibration\.samples"):
        networks.emulated(RotationSet(peaks=peaks), weights)
    known = dict.fromkeys((f"{layer}.down.{e}" for layer in range(2) for e in range(24)), 9.0)
    found = networks.emulated(RotationSet(peaks=known | peaks), weights)
    assert found(ids).logits.isfinite().all()
