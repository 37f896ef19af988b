"""Networks that are timed run online what their method's networks do."""

import json

import pytest
import torch

from spinlab.bench.__main__ import main
from spinlab.bench.methods import hadamards, random_rotations
from spinlab.bench.models import random_llama
from spinlab.compose import composed
from spinlab.model.modules import map_of
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.duquant import DualTransform
from spinlab.runtime.kernels.producers.blocks import _passes_of


@pytest.fixture(scope="module")
def toy():
    return map_of(random_llama("toy", 2, torch.device("meta")))


@pytest.mark.parametrize(
    ("method", "online", "kind", "inputs", "matrices"),
    [
        ("quarot", (True, True), None, 0, 0),
        ("spinquant_no_had", (False, False), None, 0, 0),
        ("learned_fused", (True, True), None, 0, 0),
        ("learned_blocks", (True, True), BlockRotation, 6, 48 // 16),
        ("wush", (True, False), BlockRotation, 8, 48 // 16),
        ("duquant", (True, False), DualTransform, 8, 1),
        ("learned_inputs", (True, False), DualTransform, 8, 48 // 16),
    ],
)
def test_what_a_method_runs_online_is_drawn(toy, method, online, kind, inputs, matrices):
    """A learned dual transform has rotations of its own for each block, a searched one shares."""
    config = composed(f"+method={method}", "rotation.duquant.block_size=16")
    found = random_rotations(config, toy)
    assert (found.r3 is not None, found.r4 is not None) == online
    assert found.r1 is None and found.r2 is None
    turning = {key: each for key, each in found.inputs.items() if each.is_online}
    assert len(turning) == inputs
    assert {type(each.dual) for each in turning.values()} == ({kind} if kind else set())
    assert not kind or turning["0.qkv"].dual.first.shape[0] == matrices
    assert found.orthogonality() == pytest.approx(dict.fromkeys(found.orthogonality(), 0), abs=1e-9)


def test_scales_that_cannot_fold_are_there(toy):
    """With grouped queries that of what o_proj reads, where it is smoothed."""
    found = random_rotations(composed("+method=duquant"), toy).inputs
    scaled = {key for key, each in found.items() if each.scale is not None}
    assert scaled == {"0.o", "1.o"}
    assert not any(found[key].folded for key in scaled)


@pytest.mark.parametrize("method", ["learned_inputs", "learned_blocks"])
@pytest.mark.parametrize("factors", ["exact", "bfloat16"])
def test_factors_are_those_of_the_method(toy, factors, method):
    config = composed(f"+method={method}", f"rotation.factors={factors}")
    found = random_rotations(config, toy).inputs
    assert {each.rounded for each in found.values()} == {factors == "bfloat16"}
    x = torch.empty(1, 96, dtype=torch.bfloat16)
    passes = _passes_of(found["0.qkv"], x)
    assert {len(each.parts) for each in passes} == {2 if factors == "exact" else 1}
    between = torch.float32 if factors == "exact" else torch.bfloat16
    assert [each.gives for each in passes] == [between, None][-len(passes) :]


def test_without_a_method_r3_and_r4_run(toy):
    found = hadamards(toy)
    assert (found.r3.width, found.r4.width) == (toy.width("r3"), toy.width("r4"))
    assert not found.inputs


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_the_command_times_a_methods_network(tmp_path, command, capsys):
    words = [command, "--model", "toy", "--layers", "1", "--prompt", "4", "--tokens", "2"]
    out = tmp_path / "record.json"
    method = "learned_blocks", "rotation.factors=bfloat16"
    main([*words, "--batch", "1", "--method", *method, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["config"]["method"] == "learned_blocks"
    assert record["config"]["settings"]["rotation.factors"] == "bfloat16"
    assert record["metrics"][f"speedup/e2e/{command}/b1"] > 0
    refused = {
        "nope": "unknown method 'nope'",
        "rtn rotation.factors=bfloat16": "is not read with rotation.inputs=none",
        "learned_blocks method=duquant": "takes settings of rotation and learn",
    }
    for named, why in refused.items():
        with pytest.raises(SystemExit):
            main([*words, "--method", *named.split()])
        assert why in capsys.readouterr().err
