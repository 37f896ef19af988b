"""Fused linears are split into plain ones and joined again."""

import pytest
import torch
from torch import nn

from spinlab.config import ModelConfig
from spinlab.model.load import load_model
from spinlab.model.modules import map_of, prepare, restore
from spinlab.model.random import random_model
from spinlab.model.split import SplitLinear

SHAPE = {
    "model_type": "phi3",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.2,
}
CONFIG = ModelConfig(architecture=SHAPE, dtype="float64")


@pytest.fixture
def stock():
    model, split = random_model(CONFIG, 0), load_model(CONFIG, None, seed=0)
    for norm in map_of(split).norms:  # exact in float64
        model.set_submodule(norm.path, split.get_submodule(norm.path))
    return model.double().eval().requires_grad_(False)


def test_a_split_model_has_the_stock_logits(stock, ids):
    """Oracle: transformers' own slicing of the fused outputs into q, k, v and gate, up."""
    split = load_model(CONFIG, None, seed=0)
    names = [n for n, m in split.named_modules() if isinstance(m, SplitLinear)]
    assert len(names) == 4
    assert torch.allclose(split(ids).logits, stock(ids).logits, atol=1e-12, rtol=0)


def test_parts_are_plain_linears_with_the_rows_of_the_fused_one(stock):
    fused = stock.get_submodule("model.layers.0.self_attn.qkv_proj").weight.clone()
    prepare(stock)
    parts = stock.get_submodule("model.layers.0.self_attn.qkv_proj").parts()
    assert [len(part.weight) for part in parts] == [48, 24, 24]
    assert all(type(part) is nn.Linear for part in parts)
    assert torch.equal(torch.cat([part.weight for part in parts]), fused)


def test_joining_undoes_splitting(stock):
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    prepare(stock)
    assert stock.state_dict().keys() != before.keys()
    restore(stock)
    after = stock.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_joined_model_saves_as_a_stock_checkpoint(ids, tmp_path):
    split = load_model(CONFIG, None, seed=0)
    expected = split(ids).logits
    restore(split)
    split.save_pretrained(tmp_path)
    config = ModelConfig(weights="pretrained", path=str(tmp_path), dtype="float64")
    assert torch.allclose(load_model(config, None, 0)(ids).logits, expected, atol=1e-12, rtol=0)


def test_families_without_fused_linears_are_left_alone(make_model):
    model = make_model()
    names = [name for name, _ in model.named_modules()]
    prepare(model)
    restore(model)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_split_with_their_rows(bias):
    linears = [nn.Linear(6, rows, bias) for rows in (5, 3)]
    split = SplitLinear(dict(zip(("first", "second"), linears, strict=True)))
    x = torch.randn(2, 4, 6)
    assert torch.equal(split(x), torch.cat([linear(x) for linear in linears], -1))


def test_a_replaced_part_keeps_its_place():
    """Fake quantization and integer kernels put other modules where the parts were."""
    split = SplitLinear({"first": nn.Linear(6, 5), "second": nn.Linear(6, 3)})
    x = torch.randn(4, 6)
    expected = split(x)
    split.set_submodule("first", nn.Sequential(split.get_submodule("first")))
    assert torch.equal(split(x), expected)
