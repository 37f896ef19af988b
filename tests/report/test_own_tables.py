"""Tables of records of one's own, from the command line: of a folder of runs, or of named files."""

import csv
import io
import math

import pytest

from spinlab.compose import composed
from spinlab.report.__main__ import main
from tests.report.conftest import composed_once


@pytest.fixture
def runs(tmp_path, save):
    """Three methods with two seeds each, in the folders that runs leave."""
    for method, factor in (("quarot", 1.0), ("ours", 0.5), ("theirs", 0.75)):
        for seed in (0, 1):
            config = composed_once("+experiment=toy", f"seed={seed}", f"name=mine/{method}")
            perplexity = math.exp(factor * (2 + seed / 10) + 2)
            metrics = {"ppl/wiki/fp": math.exp(2.0), "ppl/wiki/fake": perplexity}
            place = f"runs/mine/{method}/{method}{seed}/record.json"
            save(place, config, metrics, model={"heads": 4})
            (tmp_path / f"runs/mine/{method}/{method}{seed}/other.json").write_text("{}")
    return tmp_path / "runs" / "mine"


def rows(capsys, *words):
    main([*words, "format=csv"])
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_runs_of_one_experiment_are_a_row(runs, capsys):
    found = {row["method"]: row for row in rows(capsys, "table=methods", f"records={runs}")}
    assert found.keys() == {"", "quarot", "ours", "theirs"}
    assert {row["seeds"] for name, row in found.items() if name} == {"2"}
    values = [math.exp(3.0), math.exp(3.05)]
    mean, spread = sum(values) / 2, abs(values[1] - values[0]) / math.sqrt(2)
    assert found["ours"]["wiki ppl"] == f"{mean:.2f} ± {spread:.2f}"


def test_the_first_method_is_the_one_whose_gap_is_closed(runs, capsys):
    words = "table=gap", f"records={runs}", "methods=quarot,theirs,ours"
    assert [row["wiki gap"] for row in rows(capsys, *words)] == ["", "", "25 %", "50 %"]


def test_seeds_have_a_table(runs, capsys):
    (first, *_) = rows(capsys, "table=seeds", f"records={runs}")
    assert (first["rotation"], first["network"], first["seeds"]) == ("ours", "fake", "2")


def test_formats_are_held_against_each_other_in_the_metric_that_is_asked_for(
    tmp_path, save, capsys
):
    for rotation, wiki in {"none": 30.0, "hadamard": 20.0}.items():
        config = composed("+experiment=formats", "model=toy", f"rotation={rotation}")
        metrics = {"ppl/wiki/fp": 9.0, "ppl/wiki/fake": wiki, "bits/weights/fake": 4.25}
        save(f"runs/{rotation}/key/record.json", config, metrics)
    words = "table=formats", f"records={tmp_path / 'runs'}", "metric=ppl/wiki"
    found = {row["rotation"]: row["RTN"] for row in rows(capsys, *words)}
    assert found == {"none": "30.00", "R1, R2, R4": "20.00"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["table=gap"], "table=gap is of one folder of records: write records=FOLDER"),
        (["table=gap", "records=RUNS"], "table=gap needs methods=BASELINE,METHOD"),
        (["table=gap", "records=RUNS", "methods=quarot"], "table=gap needs methods=BASELINE"),
        (["table=gap", "records=RUNS", "methods=quarot,our"], "did you mean ours"),
        (["table=methods", "records=RUNS", "methods=ours"], "leave methods= out"),
        (["table=methods", "records=RUNS", "model=toy"], "does not read model=: leave it out"),
        (["table=spinquant_1", "methods=ours"], "does not read methods=: leave it out"),
        (["table=methods", "records=RUNS", "metric=ppl/wiki"], "does not read metric=: leave it"),
        (["table=spinquant_1", "metric=ppl/wiki"], "does not read metric=: leave it out"),
        (["table=kv", "records=RUNS"], "mine/ours has no bits/kv/fake"),
        (["table=methods", "records=RUNS/none"], "none is no folder"),
        (["table=method", "records=RUNS"], "unknown table 'method': did you mean methods"),
        (["table=methods", "records=RUNS", "format=word"], "format=word is unknown"),
    ],
)
def test_a_wrong_word_is_told_in_one_sentence(runs, capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        main([word.replace("RUNS", str(runs)) for word in words])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_without_records_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["table=methods", f"records={tmp_path}"])
    assert "holds no records <name>_seed<N>.json, nor runs" in capsys.readouterr().err
