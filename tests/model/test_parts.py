"""Parts of a checkpoint hold, together, what the whole model does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.families import FAMILIES
from spinlab.model.load import load_model, prepared
from spinlab.model.modules import map_of
from spinlab.model.parts import Parts

CPU = torch.device("cpu")
OWN = {
    "stablelm": {"hidden_size": 32},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    **{
        family: {"num_local_experts": 3, "num_experts_per_tok": 2}
        for family in ("granitemoe", "llama4_text", "gpt_oss", "phimoe")
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_family_are_the_whole_model(tmp_path, save_checkpoint, family):
    shape = {"bos_token_id": None, "eos_token_id": None, **OWN.get(family, {})}
    save_checkpoint(tmp_path, size="8KB", model_type=family, **shape)
    config = ModelConfig(path=str(tmp_path), dtype="float64" if family == "gemma" else "bfloat16")
    whole, parts = load_model(config, None, 0), Parts(config, None)
    expected, found = dict(whole.state_dict()), {}
    final = map_of(whole).final_norm
    for layer in (*range(parts.layers), None):
        part = parts.part(layer, CPU)
        there = {name: number for name, number in part.state_dict().items() if number.numel()}
        found |= {n: x for n, x in there.items() if layer is None or not n.startswith(final)}
        assert part.dtype == whole.dtype and not part.training
        assert [*map_of(part).there] == ([] if layer is None else [layer])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], x) and found[n].dtype == x.dtype for n, x in expected.items())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


def test_random_weights_have_no_parts():
    with pytest.raises(InputError, match=r"runtime\.offload=true reads layers from a checkpoint"):
        Parts(ModelConfig(architecture={"hidden_size": 8}), None)


def test_frequencies_that_old_files_hold_are_ignored(tmp_path, save_checkpoint):
    """As they are where the model is loaded as a whole."""
    save_checkpoint(tmp_path, model_type="llama", bos_token_id=None, eos_token_id=None)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(stored, file, {"format": "pt"})
    config = ModelConfig(path=str(tmp_path), dtype="bfloat16")
    part = Parts(config, None).part(0, CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = load_model(config, None, 0).state_dict()[name]
    assert torch.equal(part.state_dict()[name], expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_layers_are_widened_behind_their_way_to_a_device(
    tmp_path, save_checkpoint, monkeypatch, mixed
):
    """Unless some of their numbers are wider in the files, which would be rounded."""
    save_checkpoint(tmp_path, model_type="qwen3_moe", dtype=torch.bfloat16, **OWN["qwen3_moe"])
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    if mixed:
        router = "model.layers.0.mlp.gate.weight"
        stored[router] = stored[router].float() + 1e-6
        save_file(stored, file, {"format": "pt"})
    config, read = ModelConfig(path=str(tmp_path), dtype="float32"), []

    def seen(model, dtype, device):
        read.append({p.dtype for n, p in model.named_parameters() if ".layers." in n})
        return prepared(model, dtype, device)

    expected = dict(load_model(config, None, 0).state_dict())
    monkeypatch.setattr("spinlab.model.parts.prepared", seen)
    found = dict(Parts(config, None).part(0, CPU).state_dict())
    assert read == [{torch.float32 if mixed else torch.bfloat16}]
    layer = {name for name in expected if ".layers.0." in name}
    assert layer <= found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in layer)
    assert {found[name].dtype for name in layer} == {torch.float32}
