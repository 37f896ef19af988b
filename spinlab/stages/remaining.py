"""Which stages of an experiment have still to run: those that the cache does not hold."""

from collections.abc import Callable
from typing import Any

from spinlab.cache import NotCached
from spinlab.stages.pipeline import Pipeline


def remaining(pipeline: Pipeline) -> set[str]:
    """Return the names of the stages that would be worked on; nothing is.

    Rounding by the experiment's method is `weights`, that of the variant rtn `weights-rtn`. One
    whose key depends on an earlier stage that is not there counts as not there.
    """
    found: set[str] = set()
    with pipeline.run.cache.only_cached():
        for name, ask in stages_of(pipeline):
            try:
                ask()
            except NotCached:
                found.add(name)
    return found


def stages_of(pipeline: Pipeline) -> list[tuple[str, Callable[[], Any]]]:
    """Return the stages that take a model, in the order of a run, with how each is asked for."""
    config = pipeline.config
    asked: list[tuple[str, Callable[[], Any]]] = []
    if config.model.is_gguf:
        asked.append(("model", lambda: pipeline.original.converted))
    if config.rotation.needs_statistics and pipeline.given.file is None:
        asked.append(("statistics", lambda: pipeline.statistics))
    asked.append(("rotate", lambda: pipeline.start))
    if pipeline.changes_factors:
        asked.append(("factors", lambda: pipeline.initial))
    if config.learn.steps:
        asked.append(("learn", lambda: pipeline.outcome))
        if pipeline.rounds_learned:
            asked.append(("factors-learned", lambda: pipeline.learned))
    if config.quant.calibrates:
        asked.append(("peaks", lambda: [pipeline.rotated(v) for v in config.eval.variants]))
    for variant in config.eval.variants:
        asked += _of_variant(pipeline, variant)
    if "fake" in config.eval.variants:
        asked.append(("layers-fake", lambda: pipeline.layers("fake")))
    return [*asked, ("outliers", pipeline.outliers)]


def _of_variant(pipeline: Pipeline, variant: str) -> list[tuple[str, Callable[[], Any]]]:
    measured = (f"eval-{variant}", lambda: pipeline.measure(variant))
    if variant == "fp":
        return [measured]
    made = [(f"handoff-{variant}", lambda: pipeline.handoff_error(variant)), measured]
    if pipeline.config.quant.rounds_weights:
        name = "weights-rtn" if variant == "rtn" else "weights"
        made.insert(0, (name, lambda: pipeline.weights(variant)))
    return made
