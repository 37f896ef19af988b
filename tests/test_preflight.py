"""What cannot run is refused before the first stage, whatever is cached."""

from pathlib import Path

import pytest

from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.pipeline import Pipeline
from spinlab.preflight import preflight


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    settings = ["+experiment=toy", "eval.tasks=[]", "eval.max_windows=1", "learn=none", *overrides]
    config = composed(*settings, f"paths.cache={folder / 'cache'}")
    return Pipeline(config, lambda step, values: None)


def refused(folder: Path, *overrides: str) -> str:
    """Return the sentence that a run is refused with, once it is sure that no stage was begun."""
    run = pipeline(folder, *overrides)
    with pytest.raises(InputError) as error:
        preflight(run)
    assert run.stages.reports == []
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kv.group_size=5"], "kv.group_size=5 does not divide 16"),
        (["quant.weights.group_size=7"], "quant.weights.group_size=7 does not divide 96"),
        (["quant.head.bits=8", "quant.head.group_size=7"], "quant.head.group_size=7 does not"),
        (["quant.activations.group_size=7"], "quant.activations.group_size=7 does not divide"),
        (['quant.overrides=[{pattern:"*.up",weights:{bits:8}}]'], "'*.up' matches no linear"),
        (
            ['quant.overrides=[{pattern:"*.up_proj",activations:{bits:8}}]'],
            "shares its input with other linears",
        ),
        (["rotation.r4_block=128"], "rotation.r4_block=128 does not divide 192"),
        (["eval.window=513"], "eval.window=513 is longer than the 512 tokens"),
        (
            ["weights=gptq", "weights.sequence_length=513"],
            "weights.sequence_length=513 is longer than the 512 tokens",
        ),
        (["learn.steps=1", "learn.sequence_length=513"], "learn.sequence_length=513 is longer"),
        (
            ["rotation=smoothquant", "rotation.statistics.sequence_length=513"],
            "rotation.statistics.sequence_length=513 is longer",
        ),
        (["rotation.load=missing.bin"], "rotation.load=missing.bin does not exist"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_model_is_refused_before_any_stage(tmp_path, overrides, words):
    assert words in refused(tmp_path, *overrides)


def test_a_sentence_does_not_depend_on_what_is_cached(tmp_path):
    groups = ["quant.weights.group_size=12"]
    run = pipeline(tmp_path, *groups, "quant.o_proj_per_head=false")
    preflight(run)
    run.weights_of("fake")  # a key that knows nothing of the inputs' groups
    again = pipeline(tmp_path, *groups)
    with pytest.raises(InputError, match="do not nest"):
        preflight(again)
    assert again.stages.reports == []
