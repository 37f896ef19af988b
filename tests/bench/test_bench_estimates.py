"""What recipes take on paper is what a run would say before its first stage."""

import json
from dataclasses import replace

import pytest

from spinlab.bench import estimates
from spinlab.bench.__main__ import main
from spinlab.bench.estimates import RATES, Case, bench_estimates, experiment, job_of, shape_of
from spinlab.compose import composed
from spinlab.memory.needs import needs
from spinlab.memory.work import works
from spinlab.model.load import meta_model

GATE = 4 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096)  # of a 7B, in float32


@pytest.fixture(scope="module")
def record():
    return bench_estimates("llama2_7b", [1, 4], windows=3, recipes=["quarot", "learned_blocks"])


def test_a_record_has_every_stage_of_every_case(record):
    metrics = record["metrics"]
    for gpus in (1, 4):
        for way in estimates.WAYS:
            about = f"quarot/{gpus}/{way}"
            for stage in ("rotate", "weights", "eval-fp", "eval-integer", "outliers"):
                assert metrics[f"bytes/{about}/{stage}/device"] > 0
                assert metrics[f"speed/{about}/{stage}"] > 0
            assert metrics[f"bytes/{about}/disk"] > 0
    whole, parts = (metrics[f"bytes/quarot/1/{way}/rotate/device"] for way in estimates.WAYS)
    assert whole == pytest.approx(GATE, rel=0.1) and parts < 0.15 * whole
    assert (
        record["config"]["rates"] == RATES and record["experiment"] == "bench/estimates/llama2_7b"
    )


def test_learning_is_not_offloaded_and_windows_are_shared_out(record):
    metrics = record["metrics"]
    learn = [metrics[f"bytes/learned_blocks/1/{way}/learn/device"]
             for way in estimates.WAYS]  # fmt: skip
    assert learn[0] == learn[1] > 40 * 2**30
    one, four = (metrics[f"speed/quarot/{n}/whole/weights"] for n in (1, 4))
    assert one / 4 < four < one / 2  # factors and sweeps are every process's own
    alone = [metrics[f"speed/quarot/{n}/whole/rotate"] for n in (1, 4)]
    assert alone[0] == alone[1]


def test_numbers_are_those_that_a_run_says(record):
    case = Case("llama2_7b", "quarot", 4, "offload")
    config = experiment(case, 3)
    job = job_of(case, config, shape_of(config))
    assert (config.weights.method, config.rotation.cross_head) == ("gptq", "hadamard")
    assert job.processes == 4 and config.runtime.offload
    said = max(need.device for need in needs(job) if need.name == "weights")
    assert record["metrics"][f"bytes/{case.name}/weights/device"] == said
    (work,) = (work for work in works(job) if work.stage == "weights")
    assert record["metrics"][f"speed/{case.name}/weights"] == round(work.seconds(RATES), 1)


def test_the_command_leaves_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimates, "RECIPES", {"duquant": estimates.RECIPES["duquant"]})
    out = tmp_path / "estimates.json"
    main(["estimates", "--model", "llama2_7b", "--gpus", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["metrics"]["bytes/duquant/2/offload/statistics/host"] > 0
    with pytest.raises(SystemExit):
        main(["estimates", "--model", "llama2_8b", "--out", str(out)])
    assert "llama2_8b" in capsys.readouterr().err


def test_qwen3_235b_has_the_numbers_of_the_published_model():
    """The total that the hub shows; all layers are alike, and of many experts two are enough."""
    config = composed("model=qwen3_235b_a22b", "model.weights=random").model

    def numbers(layers: int, experts: int) -> int:
        few = {**config.architecture, "num_hidden_layers": layers, "num_experts": experts}
        shape = meta_model(replace(config, architecture=few), None)
        return sum(p.numel() for p in shape.parameters())

    of_expert = numbers(1, 9) - numbers(1, 8)
    of_layer = numbers(2, 8) - numbers(1, 8) + 120 * of_expert
    ends = numbers(1, 8) + 120 * of_expert - of_layer
    assert ends + 94 * of_layer == 235_093_634_560
