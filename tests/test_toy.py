"""The toy model was trained, so its numbers mean something: they rank as theory says."""

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from transformers import AutoModelForCausalLM

from spinlab.compose import composed
from spinlab.model.bytes import byte_tokenizer
from spinlab.stages.pipeline import Pipeline
from spinlab.train_toy import FOLDER, plant_outliers, untrained_toy

Perplexities = Callable[..., tuple[float, float]]


@pytest.fixture(scope="module")
def perplexities(tmp_path_factory, toy_tokens) -> Perplexities:
    """Return what gives a variant's perplexity of either text under some settings."""
    cache = shutil.copytree(toy_tokens, tmp_path_factory.mktemp("toy") / "cache")
    paths = [f"paths.cache={cache}", "eval.tasks=[]"]

    def measure(variant: str, *settings: str) -> tuple[float, float]:
        run = Pipeline(composed("+experiment=toy", *paths, *settings))
        found = run.measure(variant)
        return found[f"ppl/wiki/{variant}"], found[f"ppl/c4/{variant}"]

    return measure


def test_learned_beats_hadamard_beats_no_rotation(perplexities):
    """Over two seeds and both texts: one of them alone may fall within the noise of rounding."""

    def mean(variant: str) -> float:
        found = [perplexities(variant, f"seed={seed}") for seed in (0, 1)]
        return geometric_mean(number for pair in found for number in pair)

    fp, learned, hadamard, none = map(mean, ("fp", "fake", "init", "rtn"))
    assert fp < learned < 0.99 * hadamard
    assert hadamard < none / 1.2  # gains hold the planted outliers down where nothing is rotated


def test_more_bits_are_better(perplexities):
    formats = ("quant.weights.bits", "quant.activations.bits", "kv.keys.bits", "kv.values.bits")
    by_bits = [
        perplexities("fake", "learn=none", *(f"{name}={bits}" for name in formats))
        for bits in (8, 4, 3)
    ]
    for text in (0, 1):
        eight, four, three = (found[text] for found in by_bits)
        assert eight < four < three
    assert by_bits[0][0] == pytest.approx(perplexities("fp")[0], rel=0.01)


def test_the_shipped_files_are_those_of_the_module_that_trains_them():
    shipped = AutoModelForCausalLM.from_pretrained(FOLDER)
    made = untrained_toy()
    assert {n: p.shape for n, p in shipped.named_parameters()} == {
        n: p.shape for n, p in made.named_parameters()
    }
    assert all(file.stat().st_size < 200_000 for file in Path(FOLDER).iterdir())
    text = "Bytes, é and ↑."
    assert len(byte_tokenizer()(text)["input_ids"]) == len(text.encode())


def test_planted_outliers_leave_the_function_as_it_is():
    model, ids = untrained_toy().eval(), torch.arange(64)[None]
    with torch.no_grad():
        before = model(ids).logits
        plant_outliers(model)
        assert torch.equal(model(ids).logits, before)
