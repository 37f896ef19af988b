"""Embedding and head that are one matrix: rounded once, in the original."""

import pytest
import torch

from spinlab.config import ClipSearch, KVConfig, QuantConfig, TensorQuant
from spinlab.errors import InputError
from spinlab.model.modules import ends_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.measure import stored_bytes
from spinlab.weights.ends import check_ends, quantize_tied

EIGHT = TensorQuant(bits=8, symmetric=True)
TIED = QuantConfig(tied=EIGHT)


def test_both_ends_are_made_of_one_set_of_levels(make_model):
    weights = quantize_tied(make_model, TIED, ClipSearch())
    (levels,) = weights.values()
    original, r1 = make_model(), random_orthogonal(24, torch.Generator().manual_seed(0))
    gain = original.get_submodule(map_of(original).final_norm).weight.detach().double()
    networks = QuantizedNetworks(make_model, TIED, KVConfig())
    model = networks.fused(RotationSet(r1), weights)
    embedding, head = (end.weight for end in ends_of(model))
    dense = levels.scale.double() * (levels.levels.double() - levels.zero.double())
    assert torch.allclose(embedding, dense @ r1, rtol=0, atol=1e-12)
    assert torch.allclose(head, (dense * gain) @ r1, rtol=0, atol=1e-12)
    # within half a level of the original's, row by row
    wrong = (dense - ends_of(original)[0].weight).abs()
    assert (wrong <= 0.5001 * levels.scale.double()).all() and wrong.any()


def test_a_model_without_ties_has_nothing_to_share(make_model):
    apart = make_model(tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"quant.tied.bits=8: this model has a head of its own"):
        check_ends(apart, TIED)
    check_ends(make_model(), TIED)
    assert quantize_tied(make_model, QuantConfig(), ClipSearch()) == {}


def test_one_matrix_has_one_format():
    with pytest.raises(InputError, match=r"quant.tied.bits=8 is the format of head and embedding"):
        QuantConfig(tied=EIGHT, head=EIGHT)


def test_a_tied_matrix_counts_once(make_model):
    model = make_model()
    weights = quantize_tied(lambda: model, TIED, ClipSearch(search=False))
    rest = sum(p.numel() for p in model.parameters()) - 64 * 24
    assert stored_bytes(model, weights, tied=True) == 2 * rest + 64 * 24 + 4 * 64
