"""Mixtures of experts through the whole pipeline, from settings to the record and its exports."""

import pytest
import torch

import spinlab
from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.export.base import check_exports
from tests.small_runs import BARE, exported_and_taken_again, run

SHORT = ["learn.steps=2", "learn.batch=2"]
QWEN3 = [
    *("+model.architecture.model_type=qwen3_moe", "+model.architecture.num_experts=6"),
    *("+model.architecture.num_experts_per_tok=2", "+model.architecture.moe_intermediate_size=48"),
    "+model.architecture.norm_topk_prob=true",
]
MIXTRAL = [
    *("+model.architecture.model_type=mixtral", "+model.architecture.num_local_experts=4"),
    "+model.architecture.num_experts_per_tok=2",
]
LLAMA4 = [
    *("+model.architecture.model_type=llama4_text", "+model.architecture.num_local_experts=4"),
    *("+model.architecture.no_rope_layer_interval=2", "+model.architecture.floor_scale=9"),
    "+model.architecture.attention_chunk_size=24",
]
WEIGHTS = ["learn.quantize_weights=true", "weights=qronos", "weights.qronos.samples=2"]
GPTQ = ["weights=gptq", "weights.gptq.samples=2", "rotation.cross_head=hadamard"]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [(QWEN3, WEIGHTS), (MIXTRAL, GPTQ), (LLAMA4, GPTQ)],
    ids=["qwen3_moe", "mixtral", "llama4_text"],
)
def test_a_run_is_complete_and_both_networks_are_one(tmp_path, short_text, shape, settings):
    place = tmp_path / "artefact"
    record = run(tmp_path, *shape, *SHORT, *settings, *short_text, f"export.artefact={place}")
    metrics, experts = record["metrics"], 6 if shape is QWEN3 else 4
    assert record["status"] == "complete"
    for network in ("init", "learned", "fake", "integer"):
        assert metrics[f"invariance/{network}"] < 1e-3
    assert metrics["handoff/init"] < 1e-9
    gaps = {name: value for name, value in metrics.items() if name.startswith("gap/")}
    assert gaps
    assert all(abs(value) < 1e-6 for value in gaps.values())
    width = 48 if shape is QWEN3 else 192
    layer = 96 * (2 * 96 + 2 * 32) + experts * (96 + 3 * 96 * width)
    layer += 3 * 96 * width if shape is LLAMA4 else 0  # all tokens go to another one
    norms = 2 * 96 + (2 * 16 if shape is QWEN3 else 0)
    assert record["model"]["parameters"] == 256 * 96 + 2 * (layer + norms) + 96
    assert 4 < metrics["bits/weights/fake"] < 6
    ids = torch.arange(20)[None]
    loaded = spinlab.load(place, device="cpu")
    assert loaded(ids).logits.isfinite().all()


def test_a_checkpoint_is_read_by_stock_transformers_and_taken_as_a_model_again(
    tmp_path, short_text
):
    stock = exported_and_taken_again(tmp_path, "mixtral", *MIXTRAL, *short_text)
    assert type(stock.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


@pytest.mark.parametrize("shape", [QWEN3, MIXTRAL], ids=["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("export", "sentence"),
    [
        ("compressed_tensors", "stack the weights of experts in one tensor.*: use export.artefact"),
        ("gguf", "has no place in it: it holds"),
    ],
)
def test_files_that_hold_no_experts_are_refused_by_name(tmp_path, shape, export, sentence):
    settings = ["rotation=no_had", "learn=none", "export.gguf_type=f16"][: 2 + (export == "gguf")]
    place = tmp_path / f"f.{export}"
    config = composed(*BARE, *shape, *settings, f"export.{export}={place}")
    with pytest.raises(InputError, match=sentence):
        check_exports(config)
