"""Learned ranges of keys and values, one for each side of a layer."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from spinlab.config import (
    CodecChange,
    CodecConfig,
    Config,
    KVConfig,
    KVOverride,
    LearnConfig,
    QuantConfig,
    RatesConfig,
    TensorQuant,
)
from spinlab.config.kv import KEPT
from spinlab.errors import InputError
from spinlab.kv.base import RowCodec
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.kv.path import Sides, kv_path
from spinlab.rotation.rotations import kv_clip_key

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
QUANT = QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(bits=16))
LEARN = LearnConfig(
    steps=2, batch=4, sequence_length=16, quantize_weights=True, lr=RatesConfig(r1=0.01)
)
LEARNED = replace(LEARN, lr=RatesConfig(r1=0.01, kv_clip=0.02))


@dataclass(frozen=True, eq=False)
class ByAutograd(RowCodec):
    """Round within a range as a formula whose gradient autograd finds: LSQ, zeros that stay."""

    ratio: torch.Tensor = None
    bits: int = 4
    symmetric: bool = False
    width: int = 8

    def pass_through(self, x: torch.Tensor) -> torch.Tensor:
        low, high = (self.ratio * end.clamp(*side) for end, side in _ends(x))
        top = 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1
        bottom = -top - 1 if self.symmetric else 0
        scale = (torch.maximum(high, -low) if self.symmetric else high - low) / top
        half = scale.detach().to(torch.float16).to(scale.dtype)
        scale = scale + (half - scale).detach()
        zero = torch.zeros_like(scale) if self.symmetric else -low / scale
        zero = zero + (_settled(zero) - zero).detach()
        exact = x / scale
        levels = exact + (_settled(exact) - exact).detach()
        placed = levels + zero
        held = placed.detach().clamp(bottom, top)
        low = scale * bottom if self.symmetric else low
        slack = scale / 1024  # of what is 0 by structure, noise does not choose the side
        outside = (x > low + scale * (top - bottom) + slack) | (x < low - slack)
        return (torch.where(outside, held, placed + (held - placed).detach()) - zero) * scale


def _settled(levels: torch.Tensor) -> torch.Tensor:
    """Round what is half within 1/512 to even, and the rest to the nearest."""
    return ((levels * 512).round() / 512).round()


def _ends(x: torch.Tensor):
    return (x.amin(-1, keepdim=True), (None, 0)), (x.amax(-1, keepdim=True), (0, None))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_ranges_are_those_of_autograd(make_model, learner_of, symmetric):
    make = partial(make_model, dtype=torch.float64)
    codec = CodecConfig(bits=4, symmetric=symmetric, clip_ratio=0.8)
    kv = KVConfig(keys=codec, values=replace(codec, clip_ratio=0.9))
    found, plain = (learner_of(make, learn, QUANT, kv) for learn in (LEARNED, LEARN))
    learned, path = found.space.kv_ranges, kv_path_of(plain.model)
    ratios = {key: learned.value(key).double().requires_grad_() for key in learned.logs}
    sides = (
        Sides(*(ByAutograd(ratios.get(kv_clip_key(n, side)), 4, symmetric) for side in KEPT))
        for n in range(2)
    )
    set_kv_path(plain.model, replace(path, layers=tuple(sides)))
    losses = [learner.gradients(0, BATCH)[0]["loss"] for learner in (found, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert ratios.keys() == {kv_clip_key(n, side) for n in range(2) for side in KEPT}
    for key, ratio in ratios.items():
        of_log = (ratio.grad * ratio).item()
        assert abs(of_log) > 1e-4
        assert learned.logs[key].grad.item() == pytest.approx(of_log, rel=1e-5), key


def test_ranges_start_from_the_settings_and_what_has_16_bits_has_none(make_model, learner_of):
    kv = KVConfig(keys=CodecConfig(clip_ratio=0.95), values=CodecConfig(bits=16), last_layers=1)
    learner = learner_of(make_model, LEARNED, QUANT, kv)
    assert learner.result().kv_clips == {"0.keys": pytest.approx(0.95)}
    learner.step(0, BATCH)
    assert learner.result().kv_clips["0.keys"] != pytest.approx(0.95)
    off = learner_of(make_model, LEARN, QUANT, kv)
    off.step(0, BATCH)
    assert off.result().kv_clips == {}


def test_a_learned_ratio_goes_before_that_of_the_settings():
    kv, names = KVConfig(values=CodecConfig(clip_ratio=0.9), last_layers=1), ["a.0", "a.1", "a.2"]
    path = kv_path(kv, 8, layers=names, kv_clips={"0.values": 0.5, "2.keys": 0.5})
    found = [[codec and codec.clip_ratio for codec in path.sides(n)] for n in range(3)]
    assert found == [[1.0, 0.5], [1.0, 0.9], [None, None]]
    assert path.sides(0).values.packed.clip_ratio == 0.5  # which kernels read


@pytest.mark.parametrize(
    ("kv", "reason"),
    [
        (KVConfig(CodecConfig(bits=16), CodecConfig(bits=16)), "they have 16 bits"),
        (KVConfig(values=CodecConfig(codec="lloyd_max")), "kv.values.codec=lloyd_max has none"),
        (
            KVConfig(overrides=[KVOverride("*", keys=CodecChange(codec="kivi"))]),
            r"kv\.overrides\[\*\]\.keys\.codec=kivi has none",
        ),
    ],
    ids=["16 bits", "codec", "override"],
)
def test_what_has_no_range_is_refused(kv, reason):
    with pytest.raises(InputError, match=rf"learn\.lr\.kv_clip=0\.02 .*, and {reason}: set"):
        Config(quant=QUANT, learn=LEARNED, kv=kv)
