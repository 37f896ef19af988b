"""Settings in words: what differs is said, and what is the default is not."""

import pytest

from spinlab.compose import composed, options_of
from spinlab.config import plain
from spinlab.config.values import values_of
from spinlab.report.words import (
    codec_words,
    format_words,
    kept_words,
    rotation_words,
    rounding_words,
)


def settings(*words: str):
    return values_of(plain(composed(*words)))


@pytest.mark.parametrize(
    ("words", "keys", "values"),
    [
        (["kv=kv16"], "16 bits", "16 bits"),
        (["kv=k4v2"], "4 bits", "2 bits"),
        (["kv=kv4_quarot"], "4 bits, clipped at 0.95", "4 bits, clipped at 0.95"),
        (
            ["kv.keys.symmetric=true", "kv.keys.group_size=32", "kv.key_bias=coded"],
            "4 bits, symmetric, groups of 32, with their bias",
            "4 bits",
        ),
        (["kv=kivi2"], "KIVI, 2 bits, runs of 32", "2 bits"),
        (["kv=qjl"], "QJL, 2 signs, 8 outlier channels in 2", "2 bits"),
        (["kv=qjl_plain", "kv.keys.qjl.orthogonal=false"], "QJL, 2 signs, independent rows", ""),
        (["kv=turboquant_prod3"], "Lloyd-Max, 3 bits, one a sign of the rest, a random turn", ""),
        (["kv=vllm_k3v4"], "Lloyd-Max, 3 bits, a Hadamard turn, norm corrected", "4 bits"),
        (["kv=mxfp6_e3m2"], "MXFP6 E3M2", "MXFP6 E3M2"),
        (["kv=fp8"], "FP8", "FP8"),
    ],
)
def test_codecs(words, keys, values):
    found = settings(*words)
    assert codec_words(found, "keys") == keys
    assert not values or codec_words(found, "values") == values


def test_presets_that_code_otherwise_are_told_apart():
    presets = {name: settings(f"kv={name}") for name in options_of("kv")}
    sides = ("keys", "values", "queries")
    told = {
        name: (*(codec_words(found, side) for side in sides), kept_words(found))
        for name, found in presets.items()
    }
    codings = {
        name: str(sorted((n, str(v)) for n, v in found.items() if n.startswith("kv.")))
        for name, found in presets.items()
    }
    assert len(set(told.values())) == len(set(codings.values())) == len(presets)


def test_what_stays_in_16_bits_and_which_layers_differ():
    assert kept_words(settings("kv=kv4")) == ""
    assert kept_words(settings("kv=kv2_window")) == "4 first tokens, 128 newest"
    assert kept_words(settings("kv=vllm_k3v4")) == "2 layers at either end"
    assert kept_words(settings("kv.first_layers=3")) == "3 first layers"
    assert kept_words(settings("kv.first_layers=3", "kv.last_layers=1")) == (
        "3 first layers, 1 last layer"
    )
    changed = 'kv.overrides=[{pattern: "*.layers.?.*", keys: {bits: 8, lloyd_max: {turn: none}}}]'
    assert kept_words(settings(changed)) == "*.layers.?.*: keys {bits:8,lloyd_max:{turn:none}}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quant=w4a4_g32"], "INT4, groups of 32"),
        (["quant=w4a4"], "INT4; inputs INT4, asymmetric"),
        (["quant=w4a16"], "INT4, groups of 128; inputs 16 bits"),
        (["quant=mxfp4"], "MXFP4"),
        (["quant=nvfp4", "quant.weights.format=nvfp4_four_over_six"],
         "NVFP4 four over six; inputs NVFP4"),
        (["quant=mxfp6"], "MXFP6 E2M3"),
    ],
)  # fmt: skip
def test_formats(words, told):
    assert format_words(settings(*words, "learn=none")) == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rotation=none"], "none"),
        (["rotation=identity", "rotation.r3=none", "rotation.r4=none"], "none"),
        (["rotation=heads"], "R2, R3"),
        (["rotation=quarot"], "R1, R2, R3, R4, across heads"),
        (["rotation=random", "rotation.online=false"], "random R1, random R2"),
        (["rotation=r1_blocks"], "R1 in blocks of 32, R2, R3, R4 in blocks of 32"),
        (["rotation=input_blocks", "rotation.r3=none"], "blocks of 32 before inputs"),
        (["rotation=wush", "rotation.r3=none"], "maps in blocks of 32 before inputs"),
        (["rotation=smoothquant"], "smoothing 0.5"),
    ],
)
def test_rotations(words, told):
    assert rotation_words(settings(*words, "learn=none")) == told
    learned = rotation_words(settings(*words, "learn=spinquant"))
    assert learned == (told if told == "none" else f"{told}, learned")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["weights=rtn"], "RTN"),
        (["weights=rtn_fixed"], "RTN, whole range"),
        (["weights=gptq"], "GPTQ"),
        (["weights=lwc"], "LWC"),
        (["weights=gptaq"], "GPTAQ"),
        (["weights=qronos", "weights.qronos.strength=1"], "Qronos, strength 1"),
    ],
)
def test_roundings(words, told):
    assert rounding_words(settings(*words)) == told
