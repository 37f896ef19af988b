"""Learned ranges are used with the formats that they were learned for."""

import json
from dataclasses import replace

import pytest
import torch

from spinlab.config import (
    CodecChange,
    CodecConfig,
    FormatChange,
    KVConfig,
    KVOverride,
    Override,
    QuantConfig,
    TensorQuant,
    plain,
)
from spinlab.rotation.ranges import formats_of, warn_of_lost_ranges, with_fitting_ranges
from spinlab.rotation.rotations import RotationSet

QUANT = QuantConfig(overrides=[Override("*.down_proj", weights=FormatChange(bits=8))])
RATIOS = {"model.layers.0.mlp.up_proj": torch.tensor([0.5]).view(1, 1, 1)}
INPUTS = {"0.qkv": 0.5}
KV = KVConfig(overrides=[KVOverride("*.0.*", keys=CodecChange(bits=8))])
EIGHT = TensorQuant(bits=8)


def learned(**about) -> RotationSet:
    trained = json.loads(json.dumps({"formats": formats_of(QUANT, KV)}))  # as from a file
    return RotationSet(clips=INPUTS, weight_clips=RATIOS, about={"trained": trained, **about})


def kept(rotations: RotationSet, quant=QUANT, method="rtn") -> tuple[bool, bool]:
    found = with_fitting_ranges(rotations, quant, KV, method)
    return bool(found.weight_clips), bool(found.clips)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (True, True)),
        ({"head": EIGHT, "embedding": EIGHT}, (True, True)),  # have no learned ranges
        ({"weights": TensorQuant(bits=3, symmetric=True)}, (False, True)),
        ({"weights": TensorQuant(symmetric=True, group_size=8)}, (False, True)),
        ({"overrides": []}, (False, True)),
        ({"activations": EIGHT}, (True, False)),
        ({"o_proj_per_head": False}, (True, False)),
        (
            {"overrides": [*QUANT.overrides, Override("*", activations=FormatChange(bits=8))]},
            (True, False),
        ),
    ],
    ids=str,
)
def test_ranges_are_used_with_the_formats_they_were_learned_for(changes, expected, caplog):
    quant = replace(QUANT, **changes)
    assert kept(learned(), quant) == expected
    warn_of_lost_ranges(learned(), quant, KV, "rtn", "R.safetensors")
    sentences = [record.getMessage() for record in caplog.records]
    assert len(sentences) == 2 - sum(expected)
    assert all(s.startswith("R.safetensors carries ") and "not used" in s for s in sentences)


@pytest.mark.parametrize("method", ["gptq", "lwc"])
def test_methods_that_find_ranges_of_their_own_read_no_others(method, caplog):
    assert kept(learned(), QUANT, method) == (False, True)
    warn_of_lost_ranges(learned(), QUANT, KV, method, "R.safetensors")
    assert f"weights={method} finds its own" in caplog.text


@pytest.mark.parametrize("method", ["rtn", "gptaq", "qronos"])
def test_methods_that_keep_ranges_get_them(method, caplog):
    assert kept(learned(), QUANT, method) == (True, True)
    warn_of_lost_ranges(learned(), QUANT, KV, method, "R.safetensors")
    assert not caplog.text


def test_what_says_nothing_of_its_formats_keeps_input_ranges_only():
    assert kept(replace(learned(), about=None)) == (False, True)
    before = {"trained": {"weights_bits": 4, "activations": plain(QUANT.activations)}}
    assert kept(replace(learned(), about=before)) == (False, True)
    assert kept(replace(learned(), about=before), replace(QUANT, activations=EIGHT)) == (
        False,
        False,
    )


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"queries": CodecConfig(), "sinks": 4, "window": 8}, True),  # say what is coded, not how
        ({"keys": CodecConfig(bits=3)}, False),
        ({"values": CodecConfig(group_size=8)}, False),
        ({"overrides": []}, False),
        ({"last_layers": 1}, False),
        ({"key_bias": "coded"}, False),
    ],
    ids=str,
)
def test_ranges_of_a_cache_are_used_with_the_codecs_they_were_learned_for(changes, fits, caplog):
    given, kv = replace(learned(), kv_clips={"1.keys": 0.9}), replace(KV, **changes)
    assert bool(with_fitting_ranges(given, QUANT, kv, "gptq").kv_clips) == fits
    warn_of_lost_ranges(given, QUANT, kv, "rtn", "R.safetensors")
    told = [record.getMessage() for record in caplog.records]
    assert [" ".join(words.split()[:9]) for words in told] == [
        "R.safetensors carries clip ratios of keys and values learned"
    ] * (not fits)


def test_a_set_without_ranges_is_left_as_it_is(caplog):
    plain_set = RotationSet(about={"trained": {}})
    assert with_fitting_ranges(plain_set, QUANT, KV, "gptq") is plain_set
    warn_of_lost_ranges(plain_set, QUANT, KV, "gptq", "R.safetensors")
    assert not caplog.text
