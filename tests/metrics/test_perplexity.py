"""Perplexity against products of probabilities."""

import math

import pytest
import torch

from spinlab.metrics.perplexity import perplexity


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_perplexity_is_the_product_of_inverse_probabilities(make_model, ids, batch):
    """Brute force over every predicted token, in float64."""
    model = make_model()
    probabilities = model(ids).logits.softmax(-1)
    logs = [
        math.log(probabilities[row, position, ids[row, position + 1]])
        for row in range(ids.shape[0])
        for position in range(ids.shape[1] - 1)
    ]
    expected = math.exp(-sum(logs) / len(logs))
    assert perplexity(model, ids, batch, "test") == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_scores_its_vocabulary(make_model, ids):
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, ids, 2, "test") == pytest.approx(64)
