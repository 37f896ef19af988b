"""Attention by latents through the whole pipeline, from settings to the record and its exports."""

import pytest
import torch

import spinlab
from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.export.base import check_exports
from tests.small_runs import BARE, exported_and_taken_again, run

SHAPE = {
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"moe_intermediate_size": 48, "first_k_dense_replace": 1},
}
HEADS = ["~model.architecture.head_dim", "model.architecture.num_key_value_heads=6"]
NUMBERS = [f"+model.architecture.{name}={value}" for name, value in SHAPE.items()]
V2 = [*HEADS, *NUMBERS, "+model.architecture.model_type=deepseek_v2"]
V2 += ["+model.architecture.q_lora_rank=null"]
V3 = [*HEADS, *NUMBERS, "+model.architecture.model_type=deepseek_v3"]
V3 += [f"+model.architecture.{n}" for n in ("q_lora_rank=48", "n_group=3", "topk_group=2")]
CODED = ["kv.queries.bits=8", "eval.continued=8", "eval.attention=1"]
WEIGHTS = ["learn.steps=2", "learn.batch=2", "learn.quantize_weights=true", "weights=qronos"]
WEIGHTS += ["weights.qronos.samples=2", "rotation.latents=hadamard", *CODED]
GPTQ = ["learn=none", "weights=gptq", "weights.gptq.samples=2", "rotation.cross_head=hadamard"]


@pytest.mark.parametrize(("shape", "settings"), [(V3, WEIGHTS), (V2, GPTQ)], ids=["v3", "v2"])
def test_a_run_is_complete_and_both_networks_are_one(tmp_path, short_text, shape, settings):
    place = tmp_path / "artefact"
    record = run(tmp_path, *shape, *settings, *short_text, f"export.artefact={place}")
    metrics, learned = record["metrics"], ["learned"] * (settings is WEIGHTS)
    assert record["status"] == "complete"
    for network in ("init", *learned, "fake", "integer"):
        assert metrics[f"invariance/{network}"] < 1e-3
    assert metrics["handoff/init"] < 1e-9
    gaps = {name: value for name, value in metrics.items() if name.startswith("gap/")}
    assert gaps
    assert all(abs(value) < 1e-6 for value in gaps.values())
    assert record["model"]["cached"] == {"heads": 1, "key_dim": 8, "value_dim": 32}
    # 4 bits a number, scale and zero of 16 bits each for the key and for the latent
    assert metrics["bits/kv/fake"] == metrics["bits/kv/integer"] == 4 + 2 * 24 / 40
    assert ("orthogonality/latents.kv_latent" in str(metrics)) == (settings is WEIGHTS)
    ids = torch.arange(20)[None]
    loaded = spinlab.load(place, device="cpu")
    again = spinlab.load(place, device="cpu")(ids).logits
    whole = loaded(ids).logits
    assert torch.equal(whole, again)
    steps, cache = [], None
    for part in ids.split([15, 1, 1, 3], dim=1):
        found = loaded(part, past_key_values=cache, use_cache=True)
        steps.append(found.logits)
        cache = found.past_key_values
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-3 * whole.std()


def test_a_checkpoint_is_read_by_stock_transformers_and_taken_as_a_model_again(
    tmp_path, short_text
):
    settings = [*V3, "rotation.latents=hadamard", *short_text]
    stock = exported_and_taken_again(tmp_path, "deepseek_v3", *settings)
    assert type(stock.model.layers[1].mlp.experts).__name__ == "DeepseekV3Experts"
    assert type(stock.model.layers[1].self_attn).__name__ == "DeepseekV3Attention"


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "dense"])
@pytest.mark.parametrize("export", ["compressed_tensors", "gguf"])
def test_files_that_hold_no_latents_are_refused_by_name(tmp_path, experts, export):
    settings = ["rotation=no_had", "learn=none", "export.gguf_type=f16"][: 2 + (export == "gguf")]
    dense = [] if experts else ["model.architecture.first_k_dense_replace=2"]
    place = tmp_path / f"f.{export}"
    config = composed(*BARE, *V3, *dense, *settings, f"export.{export}={place}")
    sentence = "has no place in it: it holds" if export == "gguf" else ": use export.artefact"
    with pytest.raises(InputError, match=sentence):
        check_exports(config)
