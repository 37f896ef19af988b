"""A number that is none fails where it appears, whatever reads it next."""

import math

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


class Harness:
    """Stands for lm-eval's model, whose likelihoods are given."""

    max_length = 8

    def __init__(self, *likelihoods: float) -> None:
        self.likelihoods = likelihoods

    def _loglikelihood_tokens(self, requests, **options):
        return [(likelihood, False) for likelihood in self.likelihoods]


def test_answers_without_a_likelihood_are_no_accuracy():
    requests = [(("", ""), [1, 2], [3])] * 3
    assert len(_score(Harness(-1.0, -2.0, -math.inf), requests)) == 3
    with pytest.raises(ResultError, match="2 of 3 answers have a likelihood of nan"):
        _score(Harness(math.nan, -2.0, math.nan), requests)


def test_a_hessian_that_is_not_finite_is_not_called_ill_conditioned():
    hessian = torch.eye(4)
    error_spread(hessian, GPTQConfig())
    hessian[1, 2] = torch.nan
    with pytest.raises(ResultError, match="the Hessian has 1 of 16 numbers"):
        error_spread(hessian, GPTQConfig())
