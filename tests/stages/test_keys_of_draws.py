"""What is drawn by a run's seed has that seed in its key."""

import pytest

from spinlab.compose import composed
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.recall import recall_settings


@pytest.mark.parametrize(("kv", "drawn"), [("turboquant3", True), ("qjl", True), ("kv4", False)])
def test_a_codec_that_draws_is_one_of_its_seed(toy_cache, tmp_path, kv, drawn):
    folders = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    runs = [
        Pipeline(composed("+experiment=toy", f"kv={kv}", f"seed={seed}", *folders))
        for seed in (0, 1)
    ]
    first, second = (run.original.kv_settings for run in runs)
    assert (first != second) == drawn


def test_needles_are_those_of_their_seed_and_continuations_of_none():
    asked = composed("+experiment=toy", "eval.needle=[64]").eval
    assert recall_settings(asked, 0) != recall_settings(asked, 1)
    asked = composed("+experiment=toy", "eval.continued=16").eval
    assert recall_settings(asked, 0) == recall_settings(asked, 1)
    assert recall_settings(composed("+experiment=toy").eval, 0) == []
