"""The commands that an artefact is for: text from it, its record repeated, lm-eval's tasks.

One artefact of the toy experiment is made by the command line, and looked at from fresh processes
where the way there matters.
"""

import copy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from transformers import GenerationConfig

import spinlab
from spinlab.artefact.read import tokenizer_of
from spinlab.errors import InputError
from spinlab.evaluate.__main__ import main as evaluate
from spinlab.evaluate.verdict import Compared, agree, compared, differing
from spinlab.files import file_digest
from spinlab.generate.__main__ import converse
from spinlab.generate.__main__ import main as generate
from spinlab.generate.sampling import Sampling
from spinlab.generate.writer import Writer
from spinlab.lm_eval import register
from spinlab.lm_eval.__main__ import main as lm_eval
from spinlab.model.files import LISTING
from spinlab.model.modules import ends_of
from spinlab.streams import Lasting, ReaderLeft

TEXT = "It was the best of times, it was the worst of times. " * 60
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def place(tmp_path_factory, forks, toy_tokens) -> Path:
    """Return a folder with `artefact`, and the file `mine.txt`, on which it was measured too."""
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(toy_tokens, folder / "cache")
    (folder / "mine.txt").write_text(TEXT)
    words = (
        *("+experiment=toy", "learn=none", "tracker=none", "weights=rtn"),
        *("eval.variants=[fp,fake,integer]", "eval.max_windows=4", "eval.tasks=[arc_easy]"),
        *(f"data.evaluation=[wiki,{folder}/mine.txt]", f"export.artefact={folder}/artefact"),
        *(f"paths.cache={folder}/cache", f"paths.runs={folder}/runs"),
    )
    run(forks, folder, "spinlab", *words)
    return folder


@pytest.fixture(scope="module")
def artefact(place) -> str:
    return str(place / "artefact")


@pytest.fixture
def altered(place, tmp_path) -> Callable[[Callable[[dict], None]], str]:
    """Return what copies the artefact and changes its record, which no digest protects."""

    def make(change: Callable[[dict], None]) -> str:
        folder = shutil.copytree(place / "artefact", tmp_path / "altered")
        listing = json.loads((folder / LISTING).read_text())
        change(listing["spinlab"]["record"])
        (folder / LISTING).write_text(json.dumps(listing))
        return str(folder)

    return make


def run(forks, folder: Path, module: str, *words: str) -> str:
    """Run a command to its end in another process; return what it printed."""
    process = forks.start(folder, module, *words)
    said, told = process.communicate()
    assert process.returncode == 0, told
    return said


def mistake(run: Callable[[list[str]], None], *words: str, capsys) -> str:
    """Return the one sentence that a command ends with."""
    with pytest.raises(SystemExit) as end:
        run(list(words))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


# evaluate ----------------------------------------------------------------------------------------


def test_the_record_is_repeated_to_the_bit(place, artefact, forks, tmp_path):
    words = (artefact, "--json", "--texts", str(place / "mine.txt"))
    found = json.loads(run(forks, tmp_path, "spinlab.evaluate", *words))
    assert found["agrees"] and found["differs"] == []
    assert {"ppl/wiki", "ppl/mine.txt", "zeroshot/arc_easy/acc_norm", "zeroshot_mean/accuracy"} < (
        found["metrics"].keys()
    )
    assert all(row["now"] == row["record"] for row in found["metrics"].values())
    assert all(row["tolerance"] == 0 for row in found["metrics"].values())


def test_other_questions_are_asked_and_not_compared(place, artefact, capsys):
    words = [artefact, "--texts", str(place / "mine.txt"), "--backend", "torch"]
    evaluate([*words, "--limit", "2", "--tasks", "boolq"])
    said = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line[:2] == "| "}
    assert "of other questions" in rows["zeroshot/arc_easy/acc"]
    assert "not in the record" in rows["zeroshot/boolq/acc"]
    assert "backend cpu there, torch here" in said
    assert "left out, as they need the original: KL" in said


def test_a_number_that_is_not_the_network_s_is_found(place, altered, capsys):
    folder = altered(lambda record: record["metrics"].update({"ppl/wiki/integer": 1.0}))
    words = [folder, "--texts", str(place / "mine.txt"), "--backend", "torch"]
    with pytest.raises(SystemExit) as end:
        evaluate(words)
    assert end.value.code == 1
    assert re.search(r"ppl/wiki .* differs \(within 0\.\d+ expected\)", capsys.readouterr().out)


def test_what_is_not_what_was_measured_is_refused(place, artefact, altered, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text(TEXT + "More.")
    one = tmp_path / "mine.txt"
    texts = ("--texts", str(place / "mine.txt"))
    for words, told in (
        ((artefact,), "the record measured a file mine.txt: name it, as --texts mine.txt"),
        ((artefact, "--texts", str(one)), "text mine.txt is not the one that the record measured"),
        ((artefact, *texts, "--tasks", "arc_easy"), "the record has it, and it is asked anyway"),
        ((artefact, *texts, "--tasks", "mmlu"), "no zero-shot task is named"),
        ((artefact, *texts, "--limit", "1"), "--limit 1 leaves no standard error"),
        ((str(place / "runs"),), "holds no manifest.json: name a folder that export.artefact"),
    ):
        assert told in mistake(evaluate, *words, capsys=capsys)

    def other_questions(record: dict) -> None:
        record["identity"]["questions"]["arc_easy"] = "0" * 64

    said = mistake(evaluate, altered(other_questions), *texts, capsys=capsys)
    assert "the questions of arc_easy are not those that the record asked" in said


@pytest.mark.parametrize("gone", ["config", "metrics", "identity", "environment"])
def test_without_a_record_there_is_nothing_to_repeat(altered, capsys, gone):
    folder = altered(lambda record: record.pop(gone))
    assert "there is nothing to repeat" in mistake(evaluate, folder, capsys=capsys)


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        ("config.eval.new", 1, "Key 'new' not in 'EvalConfig'"),
        ("config.eval.window", "long", "Value 'long' of type 'str' could not be converted"),
        ("config.eval.window", "${oc.env:HOME}", "it refers to what lies elsewhere"),
        ("config.eval", [], "it is no list of names and values"),
        ("identity.evaluation", None, "identity.evaluation"),
        ("identity.evaluation.wiki", {"part": "whole"}, "identity.evaluation"),
        ("identity.questions", [], "identity.questions"),
        ("environment.threads", "x", "environment.threads"),
        ("environment.packages", 1, "environment.packages"),
        ("metrics.ppl/wiki/integer", "low", "metrics"),
    ],
)
def test_a_record_of_another_form_is_not_guessed(altered, capsys, part, value, told):
    *parents, name = part.split(".")

    def change(record: dict) -> None:
        for parent in parents:
            record = record[parent]
        record[name] = value

    said = mistake(evaluate, altered(change), capsys=capsys)
    assert f"cannot be read ({told}" in said
    assert "install the version of spinlab that wrote it" in said


def test_where_nothing_is_compared_nothing_agrees(place, artefact, altered, capsys):
    """The record of a run that measured the original alone; and other questions alone."""

    def of_the_original(record: dict) -> None:
        own = ("/integer", "/fake")
        record["metrics"] = {n: v for n, v in record["metrics"].items() if not n.endswith(own)}
        del record["identity"]["evaluation"]["mine.txt"]

    words = ["--json", "--backend", "torch"]
    with pytest.raises(SystemExit) as end:
        evaluate([altered(of_the_original), *words])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert json.loads(said.out)["agrees"] is None
    assert "nothing was compared, as its record has none of these numbers" in said.err
    other = compared(RECORD, {"zeroshot/piqa/acc": 0.5}, {}, same=True, limit=2)
    assert agree(list(other)) is None and agree([]) is None


RECORD = {
    "metrics": {
        **{"ppl/wiki/integer": 10.0, "ppl/c4/integer": 20.0, "ppl/wiki/fake": 9.9},
        **{"ppl/b/integer": 1.0, "ppl/d/integer": 1.0, "kl/b/integer": 1e-6},
        **{"kl/c4/integer": 1.0},
        **{"kl/wiki/integer": 1e-6, "gap/wiki": 0.03},
        **{"zeroshot/piqa/acc/integer": 0.5, "zeroshot/piqa/n/integer": 4},
        **{"zeroshot/piqa/acc_stderr/integer": 0.1, "zeroshot_mean/stderr/integer": 0.2},
        "zeroshot_mean/accuracy/integer": 0.5,
    },
    "config": {"eval": {"limit": 4}},
}


@pytest.mark.parametrize(
    ("metric", "now", "agrees"),
    [
        ("ppl/wiki", 10.618, True),  # twice its gap: exp(0.06)
        ("ppl/wiki", 10.619, False),
        ("ppl/c4", 20.816, True),  # exp(4·sqrt(1 / 10000))
        ("ppl/c4", 20.817, False),
        ("ppl/b", 1.00501, True),  # exp(0.005)
        ("ppl/b", 1.00502, False),
        ("ppl/d", 1.0512, True),  # exp(0.05)
        ("ppl/d", 1.0513, False),
        ("zeroshot/piqa/acc", 0.75, True),  # one question
        ("zeroshot/piqa/acc", 0.0, False),
        ("zeroshot_mean/accuracy", 0.89, True),
        ("zeroshot_mean/accuracy", 0.91, False),
        ("ppl/other", 5.0, None),
    ],
)
def test_another_machine_agrees_within_what_rounding_moves(metric, now, agrees):
    tokens = {metric.partition("/")[2]: 10_000}
    compares_not = Compared("ppl/new", None, 2.0, None)
    (row,) = compared(RECORD, {metric: now}, tokens, same=False, limit=4)
    assert row.agrees is agrees
    (row,) = compared(RECORD, {metric: now}, tokens, same=True, limit=4)
    assert row.agrees is (None if agrees is None else False)
    assert agree([row]) is row.agrees
    assert agree([row, compares_not]) is row.agrees


def test_a_machine_is_the_same_where_sums_are():
    there = {"backend": "cpu", "cpu": "A", "threads": 2, "packages": {"torch": "1", "geoopt": "1"}}
    here = {**copy.deepcopy(there), "cores": 4, "python": "3"}
    here["packages"]["geoopt"] = "2"
    assert differing(there, here) == []
    here["packages"]["torch"], here["threads"] = "2", 1
    assert differing(there, here) == ["threads 2 there, 1 here", "torch 1 there, 2 here"]


# generate ----------------------------------------------------------------------------------------


def test_a_prompt_is_continued_as_transformers_does(artefact, capsys, monkeypatch):
    model, tokenizer = spinlab.load(artefact), tokenizer_of(artefact)
    ids = torch.tensor([tokenizer("The city of")["input_ids"]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    generate([artefact, "--max-new-tokens", "20", "The city of"])
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("The city of\n"))
    generate([artefact, "--max-new-tokens", "20"])
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        (None, "the prompt is empty"),
        (io.StringIO("\n"), "the prompt is empty"),
        (io.TextIOWrapper(io.BytesIO(b"ab\xff")), "stdin is no UTF-8 (byte 2): convert it first"),
    ],
)
def test_a_pipe_without_text_is_a_mistake(artefact, capsys, monkeypatch, stdin, told):
    monkeypatch.setattr("sys.stdin", stdin)
    assert told in mistake(generate, artefact, capsys=capsys)


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_sums_repeat_themselves_before_torch_is_there_to_listen(name):
    code = f"""
import os, sys
from spinlab.{name}.__main__ import main
assert "torch" not in sys.modules
class Listener:
    def find_spec(name, *_):
        if name == "torch":
            sys.exit(os.environ.get("MKL_CBWR"))
sys.meta_path.insert(0, Listener)
main(["."])
"""
    env = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "AUTO,STRICT\n"


def test_sampling_repeats_itself_by_its_seed(artefact, capsys):
    said = []
    for seed in ("1", "1", "2"):
        options = ["--temperature", "0.9", "--top-p", "0.9", "--seed", seed]
        generate([artefact, "In the year", "--max-new-tokens", "30", *options])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_how_tokens_are_chosen_is_not_the_model_s_own_affair(artefact, capsys, temperature):
    model, tokenizer = spinlab.load(artefact), tokenizer_of(artefact)
    tokens = model.generation_config.eos_token_id
    said = []
    for own in (
        {},
        {"repetition_penalty": 5.0, "min_p": 0.9, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2, "stop_strings": ["e"]},
        {"penalty_alpha": 0.6, "top_k": 4, "use_cache": False, "max_time": 0.0},
    ):
        model.generation_config = GenerationConfig(eos_token_id=tokens, **own)
        torch.manual_seed(0)
        writer = Writer(model, tokenizer, Sampling(12, temperature), chat=False)
        said.append(writer.answer("In the year"))
    assert len(set(said)) == 1 and said[0]
    assert model.generation_config.eos_token_id == tokens


def test_a_line_that_is_no_text_is_told_and_the_next_is_asked(capsys):
    def ask(prompt: str) -> str:
        raise lines.pop(0)

    lines = [UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "no"), EOFError()]
    converse(cast(Any, None), ask)
    told = "spinlab.generate: the prompt is no UTF-8 (byte 2): convert it first\n"
    assert capsys.readouterr().err == told


def test_a_conversation_goes_on_in_the_template(artefact, capsys):
    model, tokenizer = spinlab.load(artefact), tokenizer_of(artefact)
    tokenizer.chat_template = TEMPLATE
    writer = Writer(model, tokenizer, Sampling(8), chat=True)
    lines = iter(["Hello", "", "x" * 600, "And"])

    def ask(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    converse(writer, ask)
    told = capsys.readouterr()
    assert [m["role"] for m in writer.said] == ["user", "assistant"] * 2
    assert [m["content"] for m in writer.said[::2]] == ["Hello", "And"]
    assert told.out == "".join(m["content"] + "\n" for m in writer.said[1::2]) + "\n"
    assert "the conversation has" in told.err and "reads 512 at once: shorten it" in told.err


def test_nobody_reading_ends_the_writing(artefact, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", Lasting(stream))
        os.close(reader)
        answered = Writer(spinlab.load(artefact), tokenizer_of(artefact), Sampling(400), False)
        with pytest.raises(ReaderLeft):
            answered.answer("The")
        generate([artefact, "The"])


def test_an_interrupt_ends_it_quietly(artefact):
    words = [sys.executable, "-m", "spinlab.generate", artefact, "The city", "--max-new-tokens=500"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout and process.stderr and process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("",), "the prompt is empty"),
        (("x" * 600,), "the prompt has 600 tokens, and the model reads 512 at once"),
        (("x", "--chat"), "has no chat template: leave the option out"),
        (("x", "--max-new-tokens", "0"), "--max-new-tokens 0 must be at least 1"),
        (("x", "--temperature", "-1"), "--temperature -1.0 must be 0 (greedy) or more"),
        (("x", "--top-p", "0"), "--top-p 0.0 must lie above 0"),
        (("x", "--seed", str(2**70)), f"--seed {2**70} is out of range: it goes from 0 to"),
        (("x", "--seed", "-1"), "--seed -1 is out of range"),
        (("x\udcff",), "the prompt is no UTF-8 (character 1): convert it first"),
        (("x", "--backend", "triton"), "runtime.backend=triton needs a CUDA device"),
    ],
)
def test_a_mistake_is_one_sentence(artefact, capsys, words, told):
    assert told in mistake(generate, artefact, *words, capsys=capsys)


# lm-eval -----------------------------------------------------------------------------------------


def test_lm_eval_s_command_line_takes_an_artefact(artefact, tmp_path, monkeypatch):
    rows = [
        {"question": "The city of", "choices": ["London", "qzxj"], "answer": 0},
        {"question": "He was a", "choices": ["zzjq", "member"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    words = (
        *("--model", "spinlab", "--model_args", f"pretrained={artefact}"),
        *("--include_path", str(tmp_path), "--tasks", "tiny_choice"),
        *("--output_path", str(tmp_path / "out")),
    )
    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    lm_eval()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["tiny_choice"]["acc,none"] == 1.0
    assert found["config"]["model_sha"] == file_digest(Path(artefact) / LISTING)


def test_likelihoods_are_those_of_the_network(artefact):
    register()
    register()  # a second time changes nothing
    harness = get_model("spinlab")(pretrained=artefact, device="cuda:0", batch_size=2)
    embedding, head = ends_of(harness.model)  # which HFLM ties where the config says so
    assert embedding.weight.shape == head.weight.shape
    assert not torch.equal(embedding.weight, head.weight)
    requests = [
        Instance("loglikelihood", {}, ("The city of", answer), 0) for answer in (" London", " qz")
    ]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    model, tokenizer = spinlab.load(artefact), tokenizer_of(artefact)
    for (likelihood, _), request in zip(found, requests, strict=True):
        before, after = (tokenizer(text)["input_ids"] for text in request.args)
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        expected = logits.float().log_softmax(-1)[range(len(after)), after].sum().item()
        assert likelihood == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="--model_args dtype: an artefact does not read it"):
        get_model("spinlab")(pretrained=artefact, dtype="float16")


def test_lm_eval_generates_what_transformers_does_in_batches_too(artefact):
    register()
    prompts = ("The city", "In the year of")
    model, tokenizer = spinlab.load(artefact), tokenizer_of(artefact)
    harness = get_model("spinlab")(pretrained=artefact, batch_size=2)
    asked = {"until": ["@"], "max_gen_toks": 16}
    requests = [
        Instance("generate_until", {}, (prompt, dict(asked)), n) for n, prompt in enumerate(prompts)
    ]
    found = harness.generate_until(requests, disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
        assert text == tokenizer.decode(expected[0, ids.shape[1] :])
