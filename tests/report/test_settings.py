"""Records that are older than some settings."""

import json
from pathlib import Path

import pytest

from spinlab.config import Config, plain
from spinlab.config.values import values_of
from spinlab.report.averaged import read_seeds
from spinlab.report.settings import LATER, settings_of, stands_in

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NEWEST = json.loads((EXPERIMENTS / "quality" / "smollm2_135m" / "quarot_seed2.json").read_text())
UNCOMPARED = ("export", "model", "paths", "sweep")  # by their values


def without(record, *names: str):
    """Return a copy of a record that lacks some settings."""
    copied = json.loads(json.dumps(record))
    for name in names:
        *groups, last = name.split(".")
        place = copied["config"]
        for group in groups:
            place = place.get(group, {})
        place.pop(last, None)
    return copied


def test_every_setting_that_a_committed_record_lacks_is_known_to_be_later():
    names = values_of(plain(Config())).keys() - values_of(NEWEST["config"]).keys()
    unknown = sorted(n for n in names if not stands_in(n, (*LATER, *UNCOMPARED)))
    assert not unknown, "say in spinlab.report.settings what was done without them"


def test_a_record_from_before_a_setting_is_averaged_with_later_ones_that_leave_it(tmp_path, caplog):
    older = without(NEWEST, "weights.qronos", "kv.key_bias")
    other = json.loads(json.dumps(NEWEST))
    other["config"]["kv"]["key_bias"] = "coded"
    for seed, record in enumerate((without(NEWEST), older, other)):
        record["config"]["seed"] = seed
        (tmp_path / f"quarot_seed{seed}.json").write_text(json.dumps(record))
    assert [run["config"]["seed"] for run in read_seeds(tmp_path)["quarot"]] == [0, 1]
    assert "quarot_seed2.json is left out: unlike others of its row: kv.key_bias" in caplog.text


@pytest.mark.parametrize(("family", "told"), [("llama", "apart"), ("qwen2", "coded")])
def test_what_was_done_before_is_told_where_the_default_does_otherwise(family, told):
    older = without(NEWEST, "kv.key_bias")
    older["model"]["family"] = family
    assert settings_of(older)["kv.key_bias"] == told
    assert settings_of(NEWEST)["kv.key_bias"] == NEWEST["config"]["kv"]["key_bias"]


@pytest.mark.parametrize(
    ("r1", "gains", "told"),
    [
        ("none", None, "folded"),
        ("hadamard", None, "folded"),
        ("hadamard", "auto", "folded"),
        ("none", "auto", "kept"),
        ("none", "folded", "folded"),
    ],
)
def test_gains_are_told_by_what_was_done_with_them(r1, gains, told):
    """Records from before the setting had them folded always."""
    record = without(NEWEST, "rotation.gains")
    record["config"]["rotation"]["r1"] = r1
    if gains is not None:
        record["config"]["rotation"]["gains"] = gains
    assert settings_of(record)["rotation.gains"] == told


@pytest.mark.parametrize("method", ["gptaq", "qronos", "gptq"])
def test_what_other_methods_of_rounding_would_have_read_counts_for_nothing(method):
    record = json.loads(json.dumps(NEWEST))
    record["config"]["weights"]["method"] = method
    other = json.loads(json.dumps(record))
    other["config"]["weights"]["gptaq"]["strength"] = 0.75
    assert (settings_of(other) == settings_of(record)) == (method != "gptaq")
    older = without(record, f"weights.{method}.strength") if method != "gptq" else record
    assert settings_of(older).get(f"weights.{method}.strength", 1.0) == 1.0  # what was done then


def test_names_of_an_older_schema_are_not_filled_up():
    older = without(NEWEST, "kv.key_bias") | {"schema": 2}
    assert "kv.key_bias" not in settings_of(older)
