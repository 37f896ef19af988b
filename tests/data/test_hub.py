"""Texts of the hub come from its cache, or fail at once where it cannot be reached."""

import json
import time

import datasets
import pyarrow
import pytest
from huggingface_hub import constants

from spinlab.config import DataConfig
from spinlab.data import hub
from spinlab.data.text import read_texts
from spinlab.errors import InputError


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that does not answer, and empty local caches."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path))
    hub._answers.cache_clear()
    yield
    hub._answers.cache_clear()


def test_a_hub_that_does_not_answer_is_switched_off_for_a_while(no_hub):
    online = not constants.HF_HUB_OFFLINE
    with hub.hub_or_cache():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert online is not constants.HF_HUB_OFFLINE


def test_wikitext2_without_a_hub_fails_at_once_and_names_the_ways_out(no_hub):
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"use data=packaged.*data.evaluation=\["):
        read_texts(DataConfig("wikitext2", ["wikitext2"]))
    assert time.perf_counter() - start < 10


def test_a_data_set_in_the_local_cache_needs_no_hub(no_hub, tmp_path):
    """The cache is laid out as the hub's library leaves it."""
    folder = tmp_path / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"text": ["", f" = {split} = "]}).data.table
        with (
            pyarrow.OSFile(str(folder / f"wikitext-{split}.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
    splits = {name: {"name": name, "num_examples": 2} for name in ("train", "test")}
    about = {"builder_name": "parquet", "config_name": "wikitext-2-raw-v1", "splits": splits}
    about["features"] = {"text": {"dtype": "string", "_type": "Value"}}
    about["version"] = {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}
    (folder / "dataset_info.json").write_text(json.dumps({**about, "dataset_name": "wikitext"}))
    calibration, (evaluation,) = read_texts(DataConfig("wikitext2", ["wikitext2"]))
    assert (calibration.text, evaluation.text) == ("\n\n = train = ", "\n\n = test = ")
    assert calibration.label == evaluation.label == "wikitext2"
