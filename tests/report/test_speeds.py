"""The speed of a method is that of what its own settings run online."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from spinlab.bench.methods import hadamards, random_rotations
from spinlab.bench.models import random_llama
from spinlab.compose import composed, options_of
from spinlab.config import plain
from spinlab.config.values import values_of
from spinlab.errors import InputError
from spinlab.model.modules import map_of
from spinlab.report.averaged import read_seeds
from spinlab.report.online import defaults, online_form, online_parts, online_settings
from spinlab.report.records import read_record
from spinlab.report.settings import settings_of
from spinlab.report.speeds import read_speeds
from spinlab.rotation.rotations import RotationSet

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SAME = {"R3": "Hadamard", "R4": "Hadamard, blocks of its width"}


def shapes(rotations: RotationSet) -> tuple:
    """Return what a network that is timed runs online, by the shapes of its matrices."""
    turns = (rotations.r3, rotations.r4, rotations.cross_head)
    factors = [t and (t.left.shape, t.right.shape, t.blocks, t.flat) for t in turns]
    duals = {key: each.dual for key, each in rotations.inputs.items() if each.dual is not None}
    rounded = {each.rounded for each in rotations.inputs.values() if each.dual is not None}
    blocks = {key: (type(d).__name__, d.first.shape) for key, d in duals.items()}
    return (*factors, blocks, rounded)


def test_methods_have_one_form_where_what_is_drawn_for_their_timing_has_one_shape():
    model = map_of(random_llama("llama2_7b", 1, torch.device("meta")))
    drawn, forms = {"": shapes(hadamards(model))}, {"": online_parts(defaults(), 32)}
    more = ["learned_blocks rotation.blocks.size=128", "learned_inputs learn=none"]
    more += [f"{name} rotation.factors=bfloat16" for name in ("learned_inputs", "learned_blocks")]
    more += ["spinquant_had rotation.r4_block=256", "spinquant_had rotation.online=false"]
    for words in [*options_of("method"), *more]:
        method, *others = words.split()
        config = composed(f"+method={method}", *others)
        drawn[words] = shapes(random_rotations(config, model))
        forms[words] = online_parts(values_of(plain(config)), 32)
    for one, other in combinations(drawn, 2):
        assert (forms[one] == forms[other]) == (drawn[one] == drawn[other]), (one, other)
    assert len(set(map(str, forms.values()))) > 8


def test_number_formats_are_part_of_a_form_but_for_how_far_they_clip():
    def form(*words: str) -> dict:
        return online_form(values_of(plain(composed("+method=spinquant_had", *words))), 32)

    assert form() == SAME
    assert form("quant.activations.clip_ratio=0.9", "kv.keys.clip_ratio=0.95") == SAME
    assert form("quant.o_proj_per_head=false") == {**SAME, "quant.o_proj_per_head": False}
    assert form("kv.values.bits=2") == {**SAME, "kv.values.bits": 2}


def test_the_committed_methods_of_one_form_are_those_that_the_kernels_run_alike():
    records = read_seeds(EXPERIMENTS / "quality" / "smollm2_135m")
    forms = {
        m: [online_form(settings_of(r), r["model"]["heads"]) for r in rs]
        for m, rs in records.items()
    }
    assert all(form == of[0] for of in forms.values() for form in of)
    assert {method for method, (form, *_) in forms.items() if form == SAME} == {
        *("random", "quarot", "quarot_gptaq", "quarot_gptaq_full", "quarot_qronos"),
        *("quarot_qronos_full", "duquant_learned"),
        *("spinquant_had", "spinquant_had_riemannian", "learned_ranges", "learned_fused"),
    }
    assert forms["learned_blocks"][0] == {**SAME, "blocks": "blocks of 64"}
    assert forms["learned_inputs"][0] == {"R3": "Hadamard", "dual transforms": "blocks of 128"}
    assert forms["quarot_own"][0].keys() - SAME == {
        *("quant.activations.symmetric", "quant.o_proj_per_head"),
    }


def test_speeds_are_found_by_the_settings_of_a_record(save, time_network):
    timed = {None: 3.0, "learned_blocks": 2.5, "learned_inputs": 2.0, "quarot": 2.75}
    files = [
        str(time_network(phase, method, {"b1": speed, "b16": speed + by, "b64": 9.0}))
        for method, speed in timed.items()
        for phase, by in (("decode", 0.25), ("prefill", 0.125))
    ]
    speeds = read_speeds(files)

    def found(*words: str, heads: int = 9) -> dict[str, float]:
        config = composed("+experiment=toy", *words)
        return speeds.of(read_record(save("one.json", config, {}, model={"heads": heads})))

    def of(speed: float) -> dict[str, float]:
        decode = {"decode, batch 1": speed, "decode, batch 16": speed + 0.25}
        return {**decode, "prefill": speed, "memory, batch 16": 1 / (speed + 0.25)}

    assert found("+method=spinquant_had") == of(3.0)
    assert found("+method=learned_fused") == of(3.0)
    assert found("+method=quarot") == of(3.0)  # across nine heads there is no Hadamard matrix
    assert found("+method=quarot", heads=12) == of(2.75)
    assert found("+method=learned_blocks") == of(2.5)
    assert found("+method=learned_inputs") == of(2.0)
    for words in (["rtn"], ["duquant_gptq"], ["learned_blocks", "rotation.blocks.size=32"]):
        assert found(f"+method={words[0]}", *words[1:]) == {}
    assert found("+method=published/quarot") == {}  # other formats
    assert speeds.note == (
        "Speeds and memory are those of the shape of llama2_7b against bfloat16 on one NVIDIA "
        "H200: decode is 256 steps behind prompts of 512 tokens; prefill one prompt of 2048 tokens."
    )


def test_records_that_do_not_belong_together_are_refused(time_network):
    decode = time_network("decode", None, {"b1": 3.0})
    with pytest.raises(InputError, match="names no record"):
        read_speeds([])
    with pytest.raises(InputError, match=r"bench/prefill_x.json is no record of a benchmark"):
        read_speeds([str(decode), "bench/prefill_x.json"])
    broken = time_network("decode", None, {"b1": 3.0}, config={"prompt": 512})
    with pytest.raises(InputError, match="does not time a whole network"):
        read_speeds([str(broken)])
    decode = time_network("decode", None, {"b1": 3.0})
    with pytest.raises(InputError, match=r"kernels_h100.json does not time a whole network"):
        read_speeds([str(EXPERIMENTS / "bench" / "kernels_h100.json")])
    other = time_network("decode", "spinquant_had", {"b1": 3.0})
    with pytest.raises(InputError, match=r"spinquant_had_h200.json is a second decode of what"):
        read_speeds([str(decode), str(other)])
    environment = {"gpu": "NVIDIA H100"}
    other = time_network("prefill", None, {"b1": 3.0}, environment=environment)
    with pytest.raises(InputError, match="has gpu=NVIDIA H100, and another has NVIDIA H200"):
        read_speeds([str(decode), str(other)])
    config = {"model": "llama2_7b", "operations": "triton", "method": "rtn", "prompt": 128}
    other = time_network("decode", "rtn", {"b1": 3.0}, config=config)
    with pytest.raises(InputError, match="has prompt=128, and another has 512"):
        read_speeds([str(decode), str(other)])
    other = time_network("decode", "rtn", {"b1": 3.0}, config={**config, "layers": 2})
    with pytest.raises(InputError, match="with all layers"):
        read_speeds([str(other)])
    other = time_network("decode", "rtn", {"b1": 3.0}, config={**config, "method": "quarott"})
    with pytest.raises(InputError, match="no method is called 'quarott': did you mean quarot"):
        read_speeds([str(other)])


def test_what_was_timed_is_what_the_record_says_whatever_the_method_is_by_now(time_network, save):
    """Timed with blocks of 32, and the method has others since."""
    then = online_settings(composed("+method=learned_blocks", "rotation.blocks.size=32"))
    config = {"model": "llama2_7b", "operations": "triton", "method": "learned_blocks"}
    config |= {"prompt": 512, "tokens": 256, "layers": None, "settings": then}
    speeds = read_speeds(
        [str(time_network("decode", "learned_blocks", {"b1": 2.0}, config=config))]
    )
    for size, found in ((32, {"decode, batch 1": 2.0}), (64, {})):
        words = "+experiment=toy", "+method=learned_blocks", f"rotation.blocks.size={size}"
        record = read_record(save("one.json", composed(*words), {}, model={"heads": 9}))
        assert speeds.of(record) == found
