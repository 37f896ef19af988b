"""The CPU bench leaves a record of linears and decoding beside float32."""

import pytest
import torch

from spinlab.bench.cpu import bench_cpu
from spinlab.compose import composed


def test_a_record_compares_linears_and_decoding_with_float32():
    before = torch.get_num_threads()
    record = bench_cpu("toy", 1, context=5, repeats=3, threads=(1, 2), linears=[(2, 24, 48)])
    assert torch.get_num_threads() == before
    assert record["experiment"] == "bench/cpu/toy"
    assert (record["config"]["layers"], record["config"]["context"]) == (1, 5)
    metrics = record["metrics"]
    assert all(value > 0 for value in metrics.values())
    linear = "speed/cpu/linear/2x24x48"
    expected = metrics[f"{linear}/fp32/seconds"] / metrics[f"{linear}/w4a4/seconds"]
    assert metrics["speedup/cpu/linear/2x24x48"] == pytest.approx(expected)
    for decode in ("cpu/decode", "cpu/decode/threads2"):
        seconds = {
            k: metrics[f"speed/{decode}/{k}/seconds_per_token"] for k in ("fp32", "int4_kv4")
        }
        found = metrics[f"speedup/{decode}/kv4"]
        assert found == pytest.approx(seconds["fp32"] / seconds["int4_kv4"])
        assert f"speedup/{decode}/kv16" in metrics


def test_methods_decode_beside_the_same_float32():
    names = ("learned_blocks", "duquant_gptq")
    methods = {name: composed(f"+method={name}") for name in names}
    sizes = {"context": 5, "repeats": 2, "linears": ()}
    record = bench_cpu("toy", 1, **sizes, threads=(1, 2), methods=methods)
    metrics, told = record["metrics"], record["config"]["methods"]
    for decode in ("", "/threads2"):
        slow = metrics[f"speed/cpu/decode{decode}/fp32/seconds_per_token"]
        for name in names:
            of_method = f"cpu/decode/{name}{decode}"
            fast = metrics[f"speed/{of_method}/int4_kv4/seconds_per_token"]
            assert metrics[f"speedup/{of_method}/kv4"] == pytest.approx(slow / fast)
    assert told["learned_blocks"]["settings"]["rotation.inputs"] == "blocks"
    assert told["duquant_gptq"]["settings"]["rotation.inputs"] == "duquant"
