"""A cache whose codec does not reach the evaluation's windows is said to be one of 16 bits."""

import pytest

from spinlab.compose import composed
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.preflight import preflight

NONE = "no token of an evaluation window is coded"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kv=kv4"], ""),
        (["kv=kivi2"], "at most 32 of 128 tokens of an evaluation window are coded"),
        (["kv.window=1000"], NONE),
        (["kv.first_layers=1", "kv.last_layers=1"], NONE),
        (["kv.window=100"], "at most 28 of 128 tokens of an evaluation window are coded"),
        (["kv.window=32"], ""),
        (["kv=kv16"], ""),
        (["kv.window=64", "eval.needle=[64]"], "no token of a text of eval.needle=64 is coded"),
    ],
    ids=str,
)
def test_windows_that_the_codec_does_not_reach_are_told(toy_cache, tmp_path, caplog, words, said):
    folders = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    words = [*words, "runtime=torch", "rotation.r3=none"]
    preflight(Pipeline(composed("+experiment=toy", *words, *folders)))
    assert said in caplog.text
    assert said or "evaluation window" not in caplog.text
