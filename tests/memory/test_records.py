"""What is estimated of stages on a GPU, against what committed records measured there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spinlab.bench.estimates import RECIPES, bench_estimates
from spinlab.bench.memory import Setting, estimates_of, experiment, job_of
from spinlab.bench.models import SHAPES
from spinlab.compose import composed
from spinlab.learn import estimate_of
from spinlab.model.load import meta_model

BENCH = Path(__file__).parents[2] / "experiments/bench"
RECORDS = sorted(BENCH.glob("memory_*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_estimates_are_measured_peaks(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in record["config"].items() if name != "device"}
    setting = Setting(**{**settings, "variants": tuple(settings["variants"])})
    config = experiment(setting, torch.device("cpu"), Path("unread"))
    said = estimates_of(job_of(setting, config, torch.device("cuda", 0)))
    metrics = record["metrics"].items()
    measured = {name.split("/")[1]: held for name, held in metrics if name.endswith("/device")
                and name.startswith("bytes/")}  # fmt: skip
    assert {"rotate", "eval-fp"} <= measured.keys()  # a run's time may end before its stages do
    for stage, held in measured.items():
        needed = said[f"{stage.replace('layers', 'eval')}/device"]
        assert needed == pytest.approx(held, rel=0.01), stage


def test_some_record_has_all_stages():
    stages = {"rotate", "eval-fp", "weights", "handoff-integer", "eval-integer", "outliers"}
    held = [json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in RECORDS]
    assert any(stages <= {n.split("/")[1] for n in of if n.startswith("bytes/")} for of in held)


@pytest.mark.parametrize(
    ("name", "processes", "again", "above"),
    [
        ("h100", 1, False, 1.08),
        ("h100_x2", 2, False, 1.13),
        ("fused_h200", 1, True, 1.12),
        ("fused_h200_x1", 1, True, 1.14),
        ("fused_h200_x2", 2, False, 1.29),
    ],
)
def test_estimates_of_learning_lie_above_what_it_held(name, processes, again, above):
    """again: whether layers were run again in the backward pass."""
    record = json.loads((BENCH / f"learn_llama2_7b_{name}.json").read_text(encoding="utf-8"))
    held, learned = record["metrics"]["bytes/learn/peak"], record["config"]["learn"]
    assert record["environment"]["processes"] == processes
    words = ["+method=learned_fused"] if learned["quantize_weights"] else []
    words.append(f"learn.micro_batch={learned['micro_batch']}")
    config = composed("model=llama2_7b", "model.weights=random", *words)
    parts = meta_model(config.model, None), config.learn, config.quant, processes
    said = estimate_of(*parts, torch.device("cuda", 0)).bytes(again)
    assert held < said < above * held
    if processes > 1 and not learned["quantize_weights"]:  # rooms of layers that came stay reserved
        assert said < record["metrics"]["bytes/learn/peak/reserved"]


# a mixture's shape takes ten seconds to make
TODAY = [*(("llama2_70b", name) for name in RECIPES), ("qwen3_235b_a22b", "quarot_gptaq")]


@pytest.mark.parametrize("quant", ["w4a4_g32", "mxfp4"])
def test_estimates_of_learning_in_float32_are_what_it_held(quant):
    """Of shared keys there attention keeps its probabilities."""
    path = BENCH.parent / f"learned_float32/{quant}_input_blocks_seed0.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    (held,) = (s["peak_device_bytes"] for s in record["stages"] if s["name"] == "learn")
    words = [word for word in record["overrides"] if not word.startswith("eval.")]
    config, shape = composed(*words), {"model_type": "llama", **SHAPES["smollm2_135m"]}
    of_shape = replace(config.model, weights="random", architecture=shape)
    parts = meta_model(of_shape, None), config.learn, config.quant, 1
    said = estimate_of(*parts, torch.device("cuda", 0)).bytes(checkpoint=False)
    assert said == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(("model", "recipe"), TODAY)
def test_records_of_estimates_are_what_is_estimated_today(model, recipe):
    """`python -m spinlab.bench estimates` makes them anew in two minutes."""
    record = json.loads((BENCH / f"estimates_{model}.json").read_text(encoding="utf-8"))
    gpus, windows = record["config"]["gpus"], record["config"]["windows"]
    found = bench_estimates(model, gpus, windows, [recipe])["metrics"]
    assert found and found == {name: record["metrics"][name] for name in found}
