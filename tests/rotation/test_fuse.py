"""Fused rotations keep the function, and a broken one is named."""

import pytest
import torch

from spinlab.config import RotationConfig
from spinlab.fakequant.insert import insert_fake_quant
from spinlab.kv.cache import attach_kv
from spinlab.kv.path import KVPath
from spinlab.model.modules import embedding_of, head_of, linears_of, map_of
from spinlab.rotation.blocks import rotate_blocks
from spinlab.rotation.check import BrokenSite, check_invariance
from spinlab.rotation.fuse import (
    fold_norms,
    fuse,
    rotate_input,
    rotated_weight,
    rotation_gradients,
)
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.orthogonal import random_orthogonal


def rotated(model, config=None, seed=0):
    """Fold, fuse and attach what runs online; return the rotations."""
    model_map = map_of(model)
    config = config or RotationConfig()
    rotations = initial_rotations(config, model_map, torch.Generator().manual_seed(seed))
    fold_norms(model)
    fuse(model, rotations)
    insert_fake_quant(model, rotations, None)
    attach_kv(model, KVPath(rotations.r3), store=False)
    return rotations


SWITCHES = [
    RotationConfig(),
    RotationConfig(r1="random", r2="random", r3="random", r4="random"),
    RotationConfig(r3="none", r4="none"),  # SpinQuant no_had
    RotationConfig(r3="random", r3_per_layer=True),
    RotationConfig(r3="identity", r3_per_layer=True),
    RotationConfig(r1="none", r2="none"),
    RotationConfig(r1="identity", r2="none", r3="none", r4="hadamard"),
    RotationConfig(r1="none", r2="none", r3="none", r4="none"),
]


@pytest.mark.parametrize("config", SWITCHES, ids=str)
def test_fused_model_keeps_logits_in_float64(make_model, ids, config):
    model, original = make_model(), make_model()
    rotations = rotated(model, config)
    assert check_invariance(lambda: original, lambda: model, rotations, ids[:1]) < 1e-9
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-9, rtol=0)


def test_biases_are_rotated_with_their_outputs(make_model, ids):
    changes = {"attention_bias": True, "mlp_bias": True}
    model, original = make_model(**changes), make_model(**changes)
    for twin in (model, original):
        g = torch.Generator().manual_seed(5)
        for _, linear in linears_of(twin):
            linear.bias.data.normal_(generator=g)
    assert check_invariance(lambda: original, lambda: model, rotated(model), ids[:1]) < 1e-9


def test_a_linear_that_takes_another_weight_is_left_alone_but_for_its_bias(make_model):
    changes = {"attention_bias": True, "mlp_bias": True}
    whole, part = make_model(**changes), make_model(**changes)
    rotations = initial_rotations(RotationConfig(), map_of(whole), torch.Generator().manual_seed(0))
    replaced = [site.path for site in map_of(part).sites if site.layer == 0]
    # a head is rounded by itself, and rotated all the same
    for model, left in ((whole, ()), (part, [*replaced, map_of(part).head])):
        g = torch.Generator().manual_seed(5)
        for _, linear in linears_of(model):
            linear.bias.data.normal_(generator=g)
        own = {site.path: linear.weight.clone() for site, linear in linears_of(model)}
        fold_norms(model, left)
        fuse(model, rotations, left)
    fused = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        path, _, kind = name.rpartition(".")
        kept = path in replaced and kind == "weight"
        assert torch.equal(parameter, own[path] if kept else fused[name]), name


def test_folding_cuts_the_tie_between_embedding_and_head(make_model, ids):
    model, original = make_model(), make_model()
    fold_norms(model)
    assert head_of(model).weight is not embedding_of(model).weight
    assert not model.config.tie_word_embeddings
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize("site", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_broken_site_is_caught_and_named(make_model, ids, site):
    model, original = make_model(), make_model()
    rotations = rotated(model)
    name = f"model.layers.1.{site}"
    weight = model.get_submodule(name).weight
    weight.data = weight.data.roll(1, 0)  # as if the output side had been rotated wrongly
    with pytest.raises(BrokenSite, match=name):
        check_invariance(lambda: original, lambda: model, rotations, ids[:1])


def test_a_broken_head_is_told_from_the_layers(make_model, ids):
    model, original = make_model(), make_model()
    rotations = rotated(model)
    head = head_of(model)
    head.weight.data = head.weight.data.roll(1, 1)
    with pytest.raises(BrokenSite, match="the head"):
        check_invariance(lambda: original, lambda: model, rotations, ids[:1])


def test_block_rotations_are_the_dense_block_diagonal():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 12, generator=g, dtype=torch.float64)
    r = random_orthogonal(4, g)
    assert torch.allclose(rotate_input(w, r), w @ torch.block_diag(r, r, r))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 1, 12), (2, 5, 12)])
def test_blocks_of_inputs_are_turned_each_by_its_own_or_by_one(shape, count):
    g = torch.Generator().manual_seed(0)
    x, blocks = torch.randn(shape, generator=g).double(), torch.randn(count, 4, 4, generator=g)
    dense = torch.block_diag(*blocks.double().expand(3, -1, -1))
    assert torch.allclose(rotate_blocks(x, blocks), x @ dense)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.allclose(rotate_blocks(strided, blocks), x @ dense)


def test_blocks_that_do_not_tile_the_width_mix_no_tokens():
    with pytest.raises(RuntimeError):
        rotate_blocks(torch.zeros(4, 48), torch.zeros(4, 8, 8))


@pytest.mark.parametrize("sides", [("reads",), ("writes",), ("reads", "writes")])
def test_pulled_back_gradients_are_autograds(sides):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 12, generator=g, dtype=torch.float64)
    reads = random_orthogonal(4, g).requires_grad_() if "reads" in sides else None
    writes = random_orthogonal(3, g).requires_grad_() if "writes" in sides else None
    upstream = torch.randn(6, 12, generator=g, dtype=torch.float64)
    rotated_weight(w, reads, writes).backward(upstream)
    with torch.no_grad():
        found = rotation_gradients(w, upstream, reads, writes)
    for rotation, gradient in zip((reads, writes), found, strict=True):
        if rotation is None:
            assert gradient is None
        else:
            assert torch.allclose(gradient, rotation.grad, atol=1e-12)
