"""A number that is none fails where it appears, whatever reads it next."""

import math
from types import SimpleNamespace

import pytest
import torch

from spinlab.config import GPTQConfig
from spinlab.errors import ResultError
from spinlab.finite import check_finite
from spinlab.metrics.zeroshot import _score
from spinlab.weights.gptq import error_spread


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_number_that_is_none_is_named(value):
    check_finite({"a": 1.0, "b": torch.ones(2)}, "it")
    with pytest.raises(ResultError, match=f"it: b is {value}"):
        check_finite({"a": 1.0, "b": value}, "it")
    with pytest.raises(ResultError, match="it: b has 2 of 3 numbers that are nan or infinite"):
        check_finite({"b": torch.tensor([value, 1.0, value])}, "it")


def test_answers_without_a_likelihood_are_no_accuracy(make_model):
    model = make_model(torch.float32)
    lm = SimpleNamespace(model=model, batch_size=2, max_length=8)
    requests = [(("", ""), [1, 2], [3]), (("", ""), [1, 5], [3]), (("", ""), [5], [3])]
    assert len(_score(lm, model, requests)) == 3
    model.get_input_embeddings().weight[5] = torch.nan
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.ones(64, 24))
    with pytest.raises(ResultError, match="2 of 3 answers have a likelihood of nan"):
        _score(lm, model, requests)


def test_a_hessian_that_is_not_finite_is_not_called_ill_conditioned():
    hessian = torch.eye(4)
    error_spread(hessian, GPTQConfig())
    hessian[1, 2] = torch.nan
    with pytest.raises(ResultError, match="the Hessian has 1 of 16 numbers"):
        error_spread(hessian, GPTQConfig())
