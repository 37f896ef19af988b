"""What experiments take of a model that need not be there, on GPUs that need not be there either.

Each recipe is one of conf/method, on W4A4KV4, whose original and integer network are measured on
windows of one text. Nothing is loaded and nothing runs: all of it is what a run says before its
first stage, and a floor. Names of the metrics, where <way> is whole, or offload for layers that
come one by one, and stages have their names in the cache:

bytes/<recipe>/<GPUs>/<way>/<stage>/device   of one process, the most at once
…/host, …/moved                              the same of the host's memory; of networks and states
                                             on their way to the device, all in all
bytes/<recipe>/<GPUs>/<way>/disk             that all stages write to the cache
speed/<recipe>/<GPUs>/<way>/<stage>          seconds, at the rates of `RATES`
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from spinlab.bench.memory import estimates_of
from spinlab.bench.results import Results
from spinlab.bench.settings import settings_of
from spinlab.config import Config
from spinlab.memory.disk import disk
from spinlab.memory.job import Job
from spinlab.memory.work import works
from spinlab.model.load import meta_model
from spinlab.speed import INT8, MOVED, TF32
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of

RECIPES: dict[str, tuple[str, ...]] = {
    "duquant": ("method=duquant",),
    "quarot": ("method=quarot",),
    "quarot_gptaq": ("method=quarot_gptaq",),
    "quarot_qronos": ("method=quarot", "weights=qronos"),
    "spinquant_had": ("method=spinquant_had",),
    "learned_fused": ("method=learned_fused",),
    "learned_blocks": ("method=learned_blocks",),
    "learned_inputs": ("method=learned_inputs",),
}
# operations and bytes per second of an H200: dense bfloat16 products as experiments/bench/
# kv_h200.json has them, bytes at twice that, the rest as NVIDIA's data sheet says
RATES = {
    **{"bfloat16": 7.87e14, INT8: 2 * 7.87e14, TF32: 4.95e14, "float32": 6.7e13, "float64": 6.7e13},
    MOVED: 6.4e10,  # PCIe 5 x16
}
WAYS = {"whole": False, "offload": True}
_DEVICE = torch.device("cuda", 0)  # that is never asked for anything


class Case(NamedTuple):
    """Name what is estimated: a model of conf/model, a recipe, GPUs with a process each, a way."""

    model: str
    recipe: str
    gpus: int
    way: str

    @property
    def name(self) -> str:
        """The part of metrics' names that tells it from others of its model."""
        return f"{self.recipe}/{self.gpus}/{self.way}"


def bench_estimates(
    model: str,
    gpus: Sequence[int],
    windows: int = 166,
    recipes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the record of recipes, all unless some are named, on a model of conf/model.

    windows: of 2048 tokens of the evaluation text; Llama-2's tokenizer makes 166 of WikiText-2.
    """
    names = list(RECIPES if recipes is None else recipes)
    about = {"model": model, "gpus": list(gpus), "windows": windows, "recipes": names}
    results, shape = Results(f"bench/estimates/{model}", {**about, "rates": RATES}, None), None
    for recipe, way in product(names, WAYS):
        config = experiment(Case(model, recipe, 1, way), windows)
        shape = shape_of(config) if shape is None else shape
        for count in gpus:
            case = Case(model, recipe, count, way)
            results.add(dict(estimated(case, job_of(case, config, shape))))
    return results.record()


def experiment(case: Case, windows: int) -> Config:
    """Return the settings of a case; its checkpoint is at a place that nobody looks at."""
    words = ["+experiment=paper", f"model={case.model}", *RECIPES[case.recipe], "eval=quarot"]
    words += ["model.path=unread", f"runtime.offload={WAYS[case.way]}", "runtime.device=cpu"]
    words += ["eval.tasks=[]", "eval.variants=[fp,integer]", f"eval.max_windows={windows}"]
    return settings_of(words)


def shape_of(config: Config) -> PreTrainedModel:
    """Return the model of some settings as names and shapes, by its architecture there."""
    return meta_model(replace(config.model, path=None, weights="random"), None)


def job_of(case: Case, config: Config, shape: PreTrainedModel) -> Job:
    """Return what needs and operations depend on, with every stage still to run."""
    names = {name for name, _ in stages_of(Pipeline(config))}
    return Job(config, shape, _DEVICE, names, processes=case.gpus)


def estimated(case: Case, job: Job) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a case."""
    for name, count in estimates_of(job).items():
        yield f"bytes/{case.name}/{name}", count
    yield f"bytes/{case.name}/disk", disk(job)
    for work in works(job):
        yield f"bytes/{case.name}/{work.stage}/moved", work.operations[MOVED]
        yield f"speed/{case.name}/{work.stage}", round(work.seconds(RATES), 1)
