"""A published table beside our records: found by settings, averaged over seeds, judged or not."""

import csv
import json
from dataclasses import replace

import pytest

from spinlab.report.__main__ import main
from spinlab.report.publications import table_named
from spinlab.report.rows import row_config
from spinlab.report.tables.paper import HEAD, MARK, paper_sheet, paper_table

MODEL = "llama2_7b"


def row_of(name: str, method: str, bits: str = "4-4-4"):
    _, table = table_named(name)
    row = next(row for row in table.rows if (row.method, row.bits) == (method, bits))
    return row_config(table, row, MODEL)


def lines(folder, name: str, method: str, bits: str = "4-4-4") -> list[dict[str, str]]:
    """Return the lines of a row as mappings from the head's names."""
    head, *rows = paper_sheet([folder], name, [MODEL]).rows
    found = [dict(zip(head, row, strict=True)) for row in rows]
    return [line for line in found if (line["method"], line["bits"]) == (method, bits)]


@pytest.fixture
def had():
    return row_of("spinquant_1", "SpinQuant had")


def seeds(save, config, values, metric="ppl/wikitext2/fake"):
    for seed, value in enumerate(values):
        save(f"{seed}/record.json", replace(config, seed=seed), {metric: value})


def test_ours_is_the_mean_over_seeds_beside_the_papers_with_a_verdict(save, had, tmp_path):
    seeds(save, had, (5.94, 5.98, 5.99))
    line = lines(tmp_path, "spinquant_1", "SpinQuant had")[1]
    assert line["measure"] == "wikitext2 ppl"
    assert (line["ours"], line["seeds"]) == ("5.97 ± 0.03", "3")
    assert (line[f"paper {MARK}"], line["difference"]) == (f"5.9 {MARK}", "+0.07")
    assert (line["tolerance"], line["verdict"]) == ("2 %", "within")
    assert line["command"].endswith("model=llama2_7b eval=spinquant method=spinquant_had")
    seeds(save, had, (6.5, 6.5, 6.5))
    assert lines(tmp_path, "spinquant_1", "SpinQuant had")[1]["verdict"] == "outside"


def test_a_row_of_other_bits_takes_no_record_of_this_one(save, had, tmp_path):
    seeds(save, had, (5.9,))
    for bits in ("4-4-16", "4-8-16", "4-16-16"):
        for line in lines(tmp_path, "spinquant_1", "SpinQuant had", bits):
            assert (line["ours"], line["verdict"]) == ("", "not run")


def test_speed_and_place_are_no_other_protocol_and_the_name_is_none_either(save, had, tmp_path):
    other = replace(
        had, name="mine", learn=replace(had.learn, micro_batch=1), eval=replace(had.eval, batch=9)
    )
    seeds(save, other, (5.9,))
    assert lines(tmp_path, "spinquant_1", "SpinQuant had")[1]["verdict"] == "within"


OTHERWISE = {
    "text": (lambda c: replace(c, data=replace(c.data, evaluation=["c4"])), "data.evaluation=[c4]"),
    "window": (lambda c: replace(c, eval=replace(c.eval, window=1024)), "eval.window=1024"),
    "windows": (lambda c: replace(c, eval=replace(c.eval, max_windows=4)), "eval.max_windows=4"),
    "calibration": (
        lambda c: replace(c, data=replace(c.data, calibration="c4")),
        "data.calibration=c4",
    ),
    "learning": (lambda c: replace(c, learn=replace(c.learn, batch=4)), "learn.batch=4"),
    "search": (
        lambda c: replace(
            c, weights=replace(c.weights, clip=replace(c.weights.clip, search=False))
        ),
        "weights.clip.search=false",
    ),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_what_was_measured_otherwise_is_not_compared_and_the_setting_is_named(
    save, had, tmp_path, how
):
    change, told = OTHERWISE[how]
    seeds(save, change(had), (5.9,))
    line = lines(tmp_path, "spinquant_1", "SpinQuant had")[1]
    assert (line["ours"], line["difference"], line["verdict"]) == ("", "", "not compared")
    assert f"0/record.json has {told}" in line["note"]


def test_another_model_is_none_of_this_row_even_by_the_same_name(save, had, tmp_path):
    metrics = {"ppl/wikitext2/fake": 5.9}
    save("0/record.json", replace(had, model=replace(had.model, name="mine", hub="x/y")), metrics)
    sizes = {"hidden": 8, "layers": 2, "source": {}}
    save("1/record.json", had, metrics, model=sizes)
    assert lines(tmp_path, "spinquant_1", "SpinQuant had")[1]["verdict"] == "not run"
    folder = replace(had.model, name="x", path="/models/llama-2-7B-hf")
    save("2/record.json", replace(had, model=folder), metrics, model={"hidden": 4096})
    assert lines(tmp_path, "spinquant_1", "SpinQuant had")[1]["seeds"] == "1"


def test_a_zeroshot_mean_takes_each_tasks_own_metric_and_needs_all_of_them(save, tmp_path):
    config = row_of("quarot_zeroshot", "QuaRot GPTQ")
    metrics = {}
    for task, kind in config.eval.task_metrics.items():
        metrics |= {f"zeroshot/{task}/acc/integer": 0.5, f"zeroshot/{task}/{kind}/integer": 0.6564}
    save("a/record.json", config, metrics)
    (line,) = lines(tmp_path, "quarot_zeroshot", "QuaRot GPTQ")
    assert (line["ours"], line["difference"]) == ("65.64", "+0.00")
    assert (line["tolerance"], line["verdict"]) == ("0.7 points", "within")
    del metrics["zeroshot/piqa/acc/integer"], metrics["zeroshot/piqa/acc_norm/integer"]
    save("a/record.json", config, metrics)
    assert lines(tmp_path, "quarot_zeroshot", "QuaRot GPTQ")[0]["verdict"] == "not run"
    fewer = replace(config, eval=replace(config.eval, tasks=["piqa"], limit=50))
    save("a/record.json", fewer, metrics)
    (line,) = lines(tmp_path, "quarot_zeroshot", "QuaRot GPTQ")
    assert line["verdict"] == "not compared"
    assert "eval.tasks without hellaswag" in line["note"] and "eval.limit=50" in line["note"]


def test_a_measure_that_is_unlike_ours_is_shown_and_not_compared(save, had, tmp_path):
    tasks = {f"zeroshot/{task}/acc_norm/fake": 0.6 for task in had.eval.tasks}
    tasks |= {f"zeroshot/{task}/acc/fake": 0.6 for task in had.eval.tasks}
    save("a/record.json", had, tasks)
    line = lines(tmp_path, "spinquant_1", "SpinQuant had")[0]
    assert (line["ours"], line["difference"], line["verdict"]) == ("60.00", "", "not compared")
    notes = paper_sheet([tmp_path], "spinquant_1").notes
    assert any(n.startswith("zero-shot mean of 8 is not compared: the paper's") for n in notes)


def test_the_original_is_taken_from_any_run_that_measured_it(save, had, tmp_path):
    save("a/record.json", had, {"ppl/wikitext2/fp": 5.47})
    line = lines(tmp_path, "spinquant_1", "original", "16-16-16")[1]
    assert (line["ours"], line["verdict"]) == ("5.47", "within")


def test_what_is_broken_older_or_foreign_is_named_and_never_averaged(save, had, tmp_path, caplog):
    seeds(save, had, (5.9, 5.9))
    wrong = {"ppl/wikitext2/fake": 100.0}
    save("torn/record.json", had, wrong).write_text('{"schema": 2')
    save("old/record.json", replace(had, seed=5), wrong, schema=1)
    save("new/record.json", replace(had, seed=6), wrong, schema=99)
    save("run/record.json", replace(had, seed=7), wrong, status="running")
    save("null/record.json", replace(had, seed=8), {"ppl/wikitext2/fake": None})
    save("nan/record.json", replace(had, seed=9), {"ppl/wikitext2/fake": float("nan")})
    save("twice/record.json", had, wrong)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "record.json").write_text(json.dumps({"metrics": {}}))
    line = lines(tmp_path, "spinquant_1", "SpinQuant had")[1]
    assert (line["ours"], line["seeds"], line["verdict"]) == ("5.90", "2", "within")
    assert "old/record.json is left out, older than others of its row: schema 1" in line["note"]
    assert "twice/record.json is left out, a second one with its seed" in line["note"]
    for name in ("torn", "new", "run", "null", "nan", "foreign"):
        assert f"{name}/record.json is left out" in caplog.text
    (note,) = (n for n in paper_sheet([tmp_path], "spinquant_1").notes if n.startswith("Left out"))
    assert note.startswith("Left out of 10 files: 3 broken; 1 no record of a run; 1 not complete")


def test_what_choices_were_made_on_is_never_compared(save, had, tmp_path):
    choosing = replace(had, data=replace(had.data, held_out="development"))
    save("a/record.json", choosing, {"ppl/wikitext2/fake": 5.9})
    line = lines(tmp_path, "spinquant_1", "SpinQuant had")[1]
    assert line["verdict"] == "not compared"
    assert "data.held_out=development" in line["note"]


def test_settings_of_other_methods_make_no_other_row(save, had, tmp_path):
    path = save("a/record.json", had, {"ppl/wikitext2/fake": 5.9})
    record = json.loads(path.read_text())
    assert had.weights.method == "gptq"
    del record["config"]["weights"]["gptaq"]  # older than it
    path.write_text(json.dumps(record))
    assert lines(tmp_path, "spinquant_1", "SpinQuant had")[1]["verdict"] == "within"


def test_settings_under_older_names_are_no_row_of_todays(save, had, tmp_path):
    path = save("a/record.json", had, {"ppl/wikitext2/fake": 5.9})
    record = json.loads(path.read_text())
    del record["config"]["kv"]["keys"]
    path.write_text(json.dumps(record))
    assert lines(tmp_path, "spinquant_1", "SpinQuant had")[1]["verdict"] == "not run"


def test_what_is_published_only_says_so_and_has_no_command(tmp_path):
    for line in lines(tmp_path, "spinquant_1", "LLM-QAT"):
        assert (line["verdict"], line["command"]) == ("published only", "")
        assert "trains the weights" in line["note"]


@pytest.mark.parametrize("kind", ["markdown", "latex", "csv"])
def test_the_command_line_writes_a_table_in_each_format(save, had, tmp_path, capsys, kind):
    seeds(save, had, (5.94, 5.96))
    main(["table=spinquant_1", f"format={kind}", f"model={MODEL}", f"records={tmp_path}"])
    told = capsys.readouterr().out
    assert "llama3_8b" not in told.replace("\\", "")
    if kind == "markdown":
        assert told == f"{paper_table(tmp_path, 'spinquant_1', MODEL)}\n"
    elif kind == "latex":
        assert r"5.95 $\pm$ 0.01 & 2 & 5.9 \textdagger{} & +0.05 & 2 \% & within" in told
    else:
        table = list(csv.reader(told.splitlines()))
        assert table[0] == list(HEAD)
        assert {len(row) for row in table} == {len(HEAD)}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["table=spinqant_1"], "unknown table 'spinqant_1': did you mean spinquant_1"),
        (["table=spinquant_1", "format=html"], "format=html is unknown: choose one of markdown"),
        (["table=spinquant_1", "model=toy"], "spinquant_1 has no model 'toy': it has llama3_8b"),
        (["table=spinquant_1", "records=nowhere"], "records=nowhere is no folder"),
        (["tabel=spinquant_1"], "tabel= is unknown: did you mean table?"),
        (["table"], "'table' is no key=value: write one like table=…"),
        (["table=a", "table=b"], "table= is given twice"),
        (["format=csv"], "format=csv needs an output: write table=NAME, page=FILE or figure=KIND"),
        (["table=spinquant_1", "page=a.html"], "table= and page= are two outputs"),
        (["page=a.html", "figure=bits"], "page= and figure= are two outputs"),
        (["page=a.html", "model=x"], "page= does not read model=: leave it out"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"spinlab.report: {sentence}")
    assert told.count("\n") == 1
