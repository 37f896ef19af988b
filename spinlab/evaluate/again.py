"""Measure an artefact as its record was measured: the same texts, windows and questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.artefact.read import Artefact
from spinlab.config import DataConfig, EvalConfig, RuntimeConfig
from spinlab.config.schema import stored
from spinlab.data.files import read_file
from spinlab.data.questions import identities
from spinlab.data.text import TEXTS, Text, fixed_windows, read_texts, source_of, tokenize
from spinlab.device import choose_backend, choose_device, set_arithmetic
from spinlab.errors import InputError
from spinlab.evaluate.verdict import Compared, compared, differing, recorded
from spinlab.metrics.paired import mean_accuracy
from spinlab.metrics.perplexity import perplexity
from spinlab.metrics.zeroshot import check_questions, check_tokenizer, zeroshot
from spinlab.track.environment import environment


@dataclass(frozen=True)
class Again:
    """Say what is measured, and where. limit: questions of each task; None: the record's."""

    folder: str
    backend: str = "auto"
    device: str = "auto"
    tasks: Sequence[str] = ()  # beyond the record's
    limit: int | None = None
    texts: Sequence[str] = ()  # files that the record measured, which it keeps no path of

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise InputError(f"--limit {self.limit} leaves no standard error: ask at least 2")

    def measure(self) -> tuple[list[Compared], list[str]]:
        """Return every metric beside the record's, and in what the machine is not the record's.

        Raises InputError for what is no whole artefact, has no record, or was measured on texts or
        questions that are not here.
        """
        artefact = Artefact(self.folder)
        record = self._record(artefact)
        asked = self._asked(record)
        told = record["identity"]["evaluation"]
        texts = [_text(label, told[label], self.texts) for label in told]
        _check_same_questions(record, asked)
        check_questions(replace(asked, tasks=[*asked.tasks, *self.tasks]))
        device = choose_device(self.device)
        backend = choose_backend(self.backend, device)
        set_arithmetic(RuntimeConfig(threads=record["environment"].get("threads", 0)))
        others = differing(record["environment"], environment() | {"backend": backend})
        tokenizer, model = artefact.checkpoint.tokenizer(), artefact.model(device, backend)
        now: dict[str, float] = {}
        tokens: dict[str, int] = {}
        for text in texts:
            ids = tokenize(text.text, tokenizer)
            windows = fixed_windows(ids, asked.window, asked.max_windows, text.label)
            tokens[text.label] = windows[:, 1:].numel()
            now[f"ppl/{text.label}"] = perplexity(model, windows, asked.batch, text.label)
        # apart from each other, as a batch holds questions of all tasks that are asked at once
        further = _accuracies(model, tokenizer, replace(asked, tasks=list(self.tasks)))
        further.pop("zeroshot_mean/accuracy", None)
        now |= _accuracies(model, tokenizer, asked) | further
        return list(compared(record, now, tokens, not others, asked.limit)), others

    def _record(self, artefact: Artefact) -> Mapping[str, Any]:
        """Return the record of a run that measured the artefact's network."""
        record = artefact.about["record"]
        parts = ("metrics", "identity", "config", "environment")
        if not all(isinstance(record.get(name), dict) for name in parts):
            raise InputError(f"{self.folder} has no record of a run: there is nothing to repeat")
        for what, is_there in _forms(record).items():
            if not is_there:
                raise self._unreadable(what)
        return record

    def _unreadable(self, what: object) -> InputError:
        return InputError(
            f"{self.folder}: how its record was measured cannot be read ({what}): install the "
            "version of spinlab that wrote it"
        )

    def _asked(self, record: Mapping[str, Any]) -> EvalConfig:
        """Return how the record was measured, with the tasks that this network was asked."""
        try:
            asked = stored(EvalConfig, record["config"].get("eval"))
        except InputError as error:
            raise self._unreadable(error) from error
        limit = asked.limit if self.limit is None else self.limit
        metrics = record["metrics"]
        tasks = [task for task in asked.tasks if recorded(metrics, f"zeroshot/{task}/n")]
        if again := sorted(set(tasks) & set(self.tasks)):
            raise InputError(f"--tasks {again[0]}: the record has it, and it is asked anyway")
        return replace(asked, tasks=tasks, limit=limit)


def _forms(record: Mapping[str, Any]) -> dict[str, bool]:
    """Tell by name whether parts of a record have the form in which they are read."""
    identity, facts = record["identity"], record["environment"]
    texts, packages = identity.get("evaluation"), facts.get("packages", {})
    return {
        "metrics": all(isinstance(value, int | float) for value in record["metrics"].values()),
        "identity.questions": isinstance(identity.get("questions"), dict),
        "identity.evaluation": isinstance(texts, dict) and all(map(_is_told, texts.values())),
        "environment.packages": isinstance(packages, dict),
        "environment.threads": isinstance(facts.get("threads", 0), int),
    }


def _is_told(text: Any) -> bool:
    return isinstance(text, dict) and all(isinstance(text.get(n), str) for n in ("part", "digest"))


def _text(label: str, told: Mapping[str, str], files: Sequence[str]) -> Text:
    """Return a text that the record measured. Raises InputError where it is another, or missing."""
    name, held_out = source_of(label)
    path = next((file for file in files if Path(file).name in (label, name)), None)
    if told["part"] != "whole" and name in TEXTS:
        found = read_texts(DataConfig(name, [name], held_out))[1][0]
    elif path is None:
        raise InputError(f"the record measured a file {label}: name it, as --texts {label}")
    elif told["part"] == "whole":
        found = Text(label, told["part"], read_file(Path(path).expanduser()))
    else:  # the file calibrated too
        found = read_texts(DataConfig(path, [path], held_out))[1][0]
    if found.digest != told["digest"]:
        raise InputError(
            f"text {label} is not the one that the record measured (sha256 {found.digest[:16]}… "
            f"here, {told['digest'][:16]}… there): bring that one"
        )
    return found


def _check_same_questions(record: Mapping[str, Any], asked: EvalConfig) -> None:
    """Raise InputError where questions of the record's tasks have changed."""
    there = record["identity"]["questions"]
    here = identities(asked.tasks, asked.task_source)
    if changed := [task for task in asked.tasks if there.get(task) != here[task]]:
        raise InputError(
            f"the questions of {changed[0]} are not those that the record asked: install the "
            "package that it had"
        )


def _accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: EvalConfig
) -> dict[str, float]:
    """Ask the questions of the tasks; return the accuracies, and their mean."""
    if not asked.tasks:
        return {}
    check_tokenizer(tokenizer)
    found, predictions = zeroshot(
        model,
        tokenizer,
        asked.tasks,
        limit=asked.limit,
        batch_size=asked.task_batch,
        source=cast(Any, asked.task_source),
    )
    mean = mean_accuracy(predictions, asked.task_metrics)["zeroshot_mean/accuracy"]
    now = {f"zeroshot/{n}": v for n, v in found.items() if n.endswith(("/acc", "/acc_norm"))}
    return {**now, "zeroshot_mean/accuracy": mean}
