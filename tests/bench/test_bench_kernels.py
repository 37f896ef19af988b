"""Kernel benches time what they say, and their ceilings are rates."""

import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spinlab.bench import kv_decode, peer_parts, peers
from spinlab.bench.__main__ import main
from spinlab.bench.collect import collect
from spinlab.bench.formats import TIMED, formats
from spinlab.bench.groups import groups
from spinlab.bench.kernels import bench_kernels, ceilings
from spinlab.bench.kv_decode import CODECS, WINDOWS, kv
from spinlab.bench.operands import QUANTIZER, random_floats, random_rows, random_weight
from spinlab.bench.peers import LinearPeer, Product, linear_peers
from spinlab.bench.producers import producers
from spinlab.bench.products import decode, prefill
from spinlab.bench.results import Results
from spinlab.bench.runners import Setting, Stock
from spinlab.bench.timing import copies_for, measure
from spinlab.bench.transforms import transforms
from spinlab.config import CodecConfig
from spinlab.errors import InputError, ResultError
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.codecs import make_codec
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.history import History
from spinlab.runtime.fused.operations import REFERENCE
from spinlab.runtime.kernels.kv.rows import dequantize

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "bf16": 1e11}


@pytest.fixture
def results(tmp_path):
    return Results("bench/test", {}, tmp_path / "record.json")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(int(time.time()))


def test_a_longer_work_takes_longer_and_is_timed_per_call():
    calls = {"short": [lambda: time.sleep(1e-4)] * 3, "long": [lambda: time.sleep(2e-3)] * 2}
    found = measure(calls, CPU, samples=3)
    assert found["short"].seconds < found["long"].seconds
    assert found["long"].seconds > 2e-3
    assert found["long"].spread >= 0
    assert copies_for(1, CPU) == 2


def test_works_take_turns_sample_by_sample():
    """So that a GPU which slows down meanwhile is as slow for all."""
    order = []
    found = measure({n: [lambda n=n: order.append(n)] for n in "ab"}, CPU, samples=5)
    assert found.keys() == {"a", "b"} and "".join(order) == "ab" * (2 * (3 + 5))


class _Event:
    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class _Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stand for torch.cuda: a capture runs the work, a replay takes four milliseconds."""
    state = SimpleNamespace(replays=0, refuses=False)

    def replay():
        state.replays += 1
        time.sleep(4e-3)

    @contextmanager
    def capture(graph, stream):
        if state.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    fakes = {
        "Event": lambda enable_timing: _Event(),
        "Stream": lambda device=None: _Stream(),
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "graph": capture,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50_000_000),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_graphs_are_replayed_and_divided_by_their_calls(fake_cuda):
    gpu = torch.device("cuda")
    found = measure({"work": [lambda: time.sleep(5e-4)] * 2}, gpu, samples=4)["work"]
    # two passes over two calls fill a replay, of which three warm up each of two rounds
    assert found.graph and fake_cuda.replays == 2 * (3 + 4)
    assert 1e-3 < found.seconds < 4e-3
    fake_cuda.refuses = True
    found = measure({"work": [lambda: time.sleep(2e-3)]}, gpu, samples=2)["work"]
    assert not found.graph and found.seconds > 2e-3
    assert copies_for(40_000_000, gpu) == 4 and copies_for(1 << 30, gpu) == 2
    assert copies_for(1, gpu) == 64


def test_a_captured_step_starts_where_the_prompt_ended(fake_cuda):
    runner = Stock(Setting("toy", 1, 5, 4), CPU)
    ids = torch.randint(128, (2, 5))
    with torch.no_grad():
        cache = runner.prefill(ids, capacity=12)
        cast(Any, runner).device = SimpleNamespace(type="cuda")
        with pytest.MonkeyPatch.context() as patch:
            for maker in ("full", "arange"):
                stock = getattr(torch, maker)
                patch.setattr(
                    torch, maker, lambda *a, s=stock, **k: s(*a, **{**k, "device": "cpu"})
                )
            runner.stepper(cache, ids[:, -1:].clone(), filled=5)()
    assert fake_cuda.replays == 1
    assert all(int(cast(Any, layer).cumulative_length) == 5 for layer in cache.layers)


def test_a_prompt_meets_no_mask_where_a_graph_is_captured(fake_cuda, monkeypatch):
    """Some versions of transformers make one there, and attention is a slower one then."""
    runner, ids = Stock(Setting("toy", 2, 5, 4), CPU), torch.randint(128, (2, 5))
    seen = []

    def watched(*args, **kwargs):
        seen.append(kwargs["attn_mask"])
        return stock(*args, **kwargs)

    stock = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    masked = "transformers.masking_utils._ignore_causal_mask_sdpa"
    monkeypatch.setattr(masked, lambda *args, **kwargs: False)
    with torch.no_grad():
        expected = runner.model(ids, logits_to_keep=1).logits
        assert all(mask is not None for mask in seen)
        seen.clear()
        found = cast(Any, runner.read(ids)).logits
        cast(Any, runner).device = SimpleNamespace(type="cuda")
        runner.prompter(ids)()
    assert torch.allclose(found, expected, atol=1e-5)
    assert len(seen) == 2 * (1 + 2 + 1) and all(mask is None for mask in seen)
    assert fake_cuda.replays == 1


def test_the_ceilings_are_rates(results):
    rates = ceilings(CPU, results, size=64)
    assert results.metrics["ceiling/copy"] == rates["copy"] > 1e6


def test_a_random_weight_holds_its_own_sums_and_is_about_orthonormal(generator):
    weight = random_weight(64, 96, 4, generator)
    levels = weight.levels()
    assert levels.min() == -8 and levels.max() == 7
    assert torch.equal(weight.sums, levels.long().view(64, 4, 24).sum(2).int())
    variance = (levels * weight.scale).square().sum(1).mean()
    assert 0.7 < variance < 1.4


@pytest.mark.parametrize("codec", [None, *CODECS])
def test_random_rows_spread_like_normal_numbers(generator, codec):
    settings = None if codec is None else make_codec("kv.keys", CODECS[codec], 16, 0).packed
    numbers = dequantize(random_rows(2, 3, 50, 16, generator, settings), 50, torch.float32)
    most = 2 if codec is None else 2.5  # few levels lie far apart
    assert abs(numbers.mean()) < 0.2 and 0.8 < numbers.std() < most


def test_prefill_and_decode_name_their_metrics_as_tables_read_them(results):
    prefill(REFERENCE, CPU, RATES, results, cases=((20,), ((24, 16),)))
    decode(REFERENCE, CPU, RATES, results, cases=((1, 3), ((16, 24),)))
    metrics = results.metrics
    speed = {n: metrics[f"speed/prefill/20x24x16/{n}"] for n in ("bf16", "int_mm", "ours")}
    assert metrics["speedup/prefill/20x24x16"] == speed["bf16"] / speed["ours"]
    names = {"": "linear", "with_quantize/": "ours", "w4a16/": "w4a16"}
    for kind, name in names.items():
        bf16, ours = (metrics[f"speed/decode/3x16x24/{n}"] for n in ("bf16", name))
        assert metrics[f"speedup/decode/{kind}3x16x24"] == bf16 / ours
    assert metrics["floor/decode/1x16x24"] == (16 * 12 + 24 + 32) / RATES["copy"]
    assert metrics["floor/prefill/20x24x16"] > 0


def test_a_wrong_kernel_is_not_timed(results):
    def doubled(*args):
        return 2 * REFERENCE.linear(*args)

    wrong = type(REFERENCE)(**{**vars(REFERENCE), "linear": doubled})
    with pytest.raises(ResultError, match="off by"):
        decode(wrong, CPU, RATES, results, cases=((2,), ((16, 24),)))


def test_formats_are_held_against_memory_traffic(results, monkeypatch):
    formats(REFERENCE, CPU, RATES, results, cases=((96,), 5, tuple(TIMED)))
    metrics = results.metrics
    for name in TIMED:
        case = f"formats/{name}/96/round"
        assert metrics[f"floor/{case}"] == 4 * 5 * 96 / RATES["copy"]
        assert metrics[f"over_floor/{case}"] == metrics[f"speed/{case}"] / metrics[f"floor/{case}"]
    assert "speed/formats/nvfp4/96/encode" in metrics
    assert "speed/formats/fp8/96/encode" not in metrics  # it has no levels that are bytes
    monkeypatch.setattr(TokenQuantizer, "round_trip", lambda self, x: 2 * x)
    with pytest.raises(ResultError, match="not rounded as by its definition"):
        formats(REFERENCE, CPU, RATES, results, cases=((96,), 5, ("mxfp8",)))


def test_groups_are_held_against_one_product_of_floats(results, monkeypatch):
    groups(REFERENCE, CPU, RATES, results, cases=((5,), ((24, 64),)))
    for name in ("integer", "mxfp4", "nvfp4"):
        case = f"groups/{name}/5x24x64"
        ours, floats = (results.metrics[f"speed/{case}/{n}"] for n in ("ours", "float32"))
        assert results.metrics[f"ratio/{case}"] == ours / floats
    monkeypatch.setattr(
        "spinlab.bench.groups.outputs_for", lambda *_: lambda *_: torch.zeros(5, 24)
    )
    with pytest.raises(ResultError, match="do not add up as by their definition"):
        groups(REFERENCE, CPU, RATES, results, cases=((5,), ((24, 64),)))


def test_producers_are_held_against_the_gate_alone(results):
    producers(REFERENCE, CPU, RATES, results, cases=((96,), 5))
    metrics = results.metrics
    ours, eager = (metrics[f"speed/hadamard_quant/96/{n}"] for n in ("ours", "eager"))
    assert metrics["ratio/hadamard_quant/96"] == ours / eager
    assert metrics["ratio/hadamard_quant/96/fused"] > 0


def test_transforms_are_held_against_quantizing_alone(results):
    transforms(REFERENCE, CPU, RATES, results, cases=((256,), 5))
    metrics = results.metrics
    plain = metrics["speed/transform/256/quantize"]
    for kind in ("dual", "blocks", "dual_exact", "blocks_exact"):
        found = metrics[f"ratio/transform/256/{kind}"]
        assert found == metrics[f"speed/transform/256/{kind}"] / plain
    assert metrics["floor/transform/256"] == 3 * 5 * 256 / RATES["copy"]
    wrong = replace(REFERENCE, norm_quantize=lambda x, *_: REFERENCE.quantize(x, QUANTIZER))
    with pytest.raises(ResultError, match="of the levels of dual at 256 are right"):
        transforms(wrong, CPU, RATES, results, cases=((256,), 5))


def test_attention_is_held_against_torchs_fastest_back_end(results):
    kv(REFERENCE, CPU, RATES, results, cases={"toy": (2, 40, 4, 2)})
    speeds = {n: v for n, v in results.metrics.items() if n.startswith("speed/kv_decode/toy/")}
    ours = speeds.pop("speed/kv_decode/toy/ours")
    best = speeds.pop("speed/kv_decode/toy/bf16")
    assert best == min(speeds.values())
    assert results.metrics["speedup/kv_decode/toy"] == best / ours
    # keys and values of 40 rows: 64 bytes of nibbles, a scale and a zero point each
    assert results.metrics["floor/kv_decode/toy"] == 2 * 2 * 2 * 40 * 67 / RATES["copy"]
    assert any("cudnn" in name for name in results.skipped)
    for codec in [*CODECS, *WINDOWS]:
        own = results.metrics[f"speed/kv_decode/{codec}/toy/ours"]
        assert results.metrics[f"speedup/kv_decode/{codec}/toy"] == best / own


def test_floors_of_a_window_count_codes_and_floats(results, monkeypatch):
    """Of 40 tokens 3 first ones and the newest 16 in 2 bytes a number, the others in nibbles."""
    windows = {
        "some": (CodecConfig(bits=3), History(3, 16)),
        "all": (CodecConfig(), History(0, 64)),
    }
    monkeypatch.setattr(kv_decode, "WINDOWS", windows)
    kv(REFERENCE, CPU, RATES, results, cases={"toy": (2, 40, 4, 2)})
    codes, floats = 21 * (64 + 2 + 1), 19 * 2 * 128
    floor = {name: results.metrics[f"floor/kv_decode/{name}/toy"] for name in windows}
    assert floor["some"] == 2 * 2 * 2 * (codes + floats) / RATES["copy"]
    assert floor["all"] == 2 * 2 * 2 * 40 * 2 * 128 / RATES["copy"]
    assert "floor/kv_decode/affine2/toy" not in results.metrics


def test_every_figure_is_in_the_file_at_once(results, tmp_path):
    results.add({"speedup/x": 2.0})
    results.attempt("peer/y", lambda: 1 / 0)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["metrics"] == {"speedup/x": 2.0}
    assert record["skipped"] == {"peer/y": "ZeroDivisionError: division by zero"}
    assert record["environment"]["packages"]["torch"]


CASES = {"decode": ((3,), ((16, 128),))}


def test_peers_that_are_absent_leave_a_line_each(results, capsys):
    linear_peers(REFERENCE, CPU, ("humming", "gemlite", "fbgemm"), results, CASES)
    peer_parts.kv_peers(REFERENCE, CPU, ("mslk", "fbgemm"), results, {"toy": (1, 8, 4, 2)})
    peer_parts.rotation_peers(REFERENCE, CPU, ("dao", "humming"), results, tokens=2)
    assert not results.metrics
    assert len(results.skipped) == 8 + 2 + 3
    assert "No module named 'humming'" in results.skipped["peer/humming_w4a8/decode/3x16x128"]
    assert capsys.readouterr().out.count("skipped") == 13


def test_a_peer_is_checked_and_timed_beside_ours(results, monkeypatch):
    def rounded(weight):
        return Product(
            lambda x: x @ weight.mT, quantize=lambda x: x, multiply=lambda x: x @ weight.mT
        )

    made = {
        "right": LinearPeer(8, rounded, 0.05),
        "right16": LinearPeer(16, lambda w: Product(lambda x: x @ w.mT), 0.05),
        "wrong": LinearPeer(8, lambda w: Product(lambda x: x @ w.mT * 1.2), 0.05),
    }
    monkeypatch.setattr(peers, "LINEAR_PEERS", made)
    linear_peers(REFERENCE, CPU, ("right", "wrong"), results, CASES)
    metrics, case = results.metrics, "decode/3x16x128"
    ours, theirs = (metrics[f"speed/peer/right/{case}/{n}"] for n in ("ours", "peer"))
    assert metrics[f"peer/right/{case}"] == ours / theirs
    assert f"peer/right/linear/{case}" in metrics and f"peer/right16/{case}" in metrics
    assert set(results.skipped) == {f"peer/wrong/{case}"}
    assert "off by 0.2" in results.skipped[f"peer/wrong/{case}"]


def test_levels_for_peers_are_within_half_a_step(generator):
    weight = random_floats(8, 256, generator=generator)
    levels, scale, zero = peers._gemlite_levels(weight)
    grouped = levels.float().view(-1, 128)
    found = ((grouped - zero.float()) * scale.float()).view(8, 256)
    assert levels.dtype == torch.uint8 and scale.shape == (16, 1)
    assert (found - weight.float()).abs().max() < 0.6 * scale.max()


def test_attention_peers_are_checked_on_rows_of_their_format(results, monkeypatch):
    def attend(q, keys, values):
        k, v = (peer_parts._floats(t).double() for t in (keys, values))
        weights = (torch.einsum("bhgd,bhtd->bhgt", q.double(), k) / 128**0.5).softmax(-1)
        return torch.einsum("bhgt,bhtd->bhgd", weights, v).to(q.dtype)

    wrong = lambda q, k, v: attend(q, k, v) + 1  # noqa: E731
    monkeypatch.setattr(peer_parts, "KV_PEERS", {"right": attend, "wrong": wrong})
    peer_parts.kv_peers(REFERENCE, CPU, ("right", "wrong"), results, {"toy": (2, 9, 4, 2)})
    assert results.metrics["peer/right/kv_decode/toy"] > 0
    assert set(results.skipped) == {"peer/wrong/kv_decode/toy"}


def test_rows_for_peers_decode_as_their_bytes_say(generator):
    rows = peer_parts._rows((3, 16), generator)
    found = peer_parts._floats(rows)
    for row, numbers in zip(rows, found, strict=True):
        scale, shift = row[:4].view(torch.float16).double().tolist()
        nibbles = [n for byte in row[4:].tolist() for n in (byte % 16, byte // 16)]
        expected = torch.tensor([n * scale + shift for n in nibbles])
        assert torch.allclose(numbers, expected.float(), atol=1e-6)


def _record(path, name, metrics, gpu):
    record = {"experiment": name, "environment": {"gpu": gpu}, "config": {}, "metrics": metrics}
    path.write_text(json.dumps({**record, "schema": 1, "skipped": {"peer/late/x": "absent"}}))
    return path


def test_records_of_several_runs_become_one_with_each_runs_environment(tmp_path):
    old = _record(tmp_path / "a", "one", {"speedup/a": 1.0, "peer/p/decode/1x2x3": 2.0}, "old")
    new = _record(tmp_path / "b", "two", {"speedup/a": 3.0, "peer/q/decode/1x2x3": 0.5}, "new")
    found = collect([old, new], "bench/kernels")
    assert found["metrics"]["speedup/a"] == 3.0
    assert found["metrics"]["peer/best/decode/1x2x3"] == 2.0
    assert [p["environment"]["gpu"] for p in found["parts"]] == ["old", "new"]
    assert found["parts"][0]["metrics"] == ["peer/p/decode/1x2x3"]
    whole = tmp_path / "all.json"
    main(["collect", str(old), str(new), "--out", str(whole)])
    main(["collect", str(whole), str(old), "--out", str(whole)])
    again = json.loads(whole.read_text())
    assert again["metrics"]["speedup/a"] == 1.0
    assert len(again["parts"]) == 2
    assert again["skipped"] == {"peer/late/x": "absent"}
    assert 1000 < whole.with_suffix(".png").stat().st_size < 200_000
    with pytest.raises(InputError, match="is no record"):
        collect([tmp_path / "none"], "bench/kernels")


def test_gathered_figures_of_whole_networks_name_their_method(tmp_path):
    """Records of several methods have the same names, of which the last one would be left."""
    rounded = {"rotation.factors": "bfloat16", "rotation.inputs": "duquant"}
    forms = {"a": (None, {}), "b": ("learned_inputs", {"rotation.factors": None}),
             "c": ("learned_inputs", rounded)}  # fmt: skip
    for speed, (name, (method, settings)) in enumerate(forms.items()):
        metrics = {"speedup/e2e/prefill/b1": speed, "ratio/e2e/memory": 2.0 * speed}
        path = _record(tmp_path / name, "bench/prefill/toy", metrics, "one")
        record = json.loads(path.read_text())
        record["config"] = {"method": method, "settings": settings}
        path.write_text(json.dumps(record))
    found = collect([tmp_path / name for name in forms], "bench/kernels")["metrics"]
    names = ("hadamards", "learned_inputs", "learned_inputs_rounded")
    assert found == {
        name: value * speed
        for speed, method in enumerate(names)
        for name, value in (
            (f"speedup/e2e/prefill/{method}/b1", 1),
            (f"ratio/e2e/memory/{method}", 2),
        )
    }


def test_the_kernels_benchmark_asks_for_a_gpu_in_a_sentence(capsys):
    with pytest.raises(InputError, match="needs a CUDA device"):
        bench_kernels(REFERENCE, CPU, ["decode"])
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "--only", "decode", "--device", "cpu"])
    assert stop.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["decode", "--model", "llama2_7b", "--device", "cpu"])


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_whole_models_are_timed_side_by_side(tmp_path, command):
    out = tmp_path / "record.json"
    words = f"{command} --model toy --layers 1 --batch 1 2 --prompt 6 --tokens 2 --device cpu"
    main([*words.split(), "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["experiment"] == f"bench/{command}/toy"
    metrics = record["metrics"]
    for batch in (1, 2):
        slow, fast = (metrics[f"speed/e2e/{command}/b{batch}/{n}"] for n in ("bf16", "ours"))
        assert metrics[f"speedup/e2e/{command}/b{batch}"] == slow / fast > 0
    assert out.with_suffix(".png").is_file()


@torch.no_grad()
def test_the_stock_step_decodes_as_generate_does():
    runner = Stock(Setting("toy", 2, 5, 4), CPU)
    prompt = torch.randint(128, (2, 5))
    model = runner.model
    expected = cast(Any, model).generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    cache = runner.prefill(prompt, capacity=12)
    ids = expected[:, 5:6].clone()
    step, found = runner.stepper(cache, ids, filled=5), []
    for _ in range(4):
        step()
        found.append(ids.clone())
    assert torch.equal(torch.cat(found, dim=1), expected[:, 6:])
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.config, LlamaConfig)


def test_codec_of_random_rows_is_the_caches(generator):
    rows = random_rows(1, 1, 4, 8, generator)
    assert rows.layout == AffineCodec(rows.layout.grid, 8).packed
    assert rows.bytes == 4 * (4 + 2 + 1)
