"""Published numbers: every file is whole, and every row's command is what the paper says."""

import re
import shlex
from collections import Counter
from operator import attrgetter
from pathlib import Path

import pytest

from spinlab.compose import options_of
from spinlab.errors import InputError
from spinlab.report.publications import PUBLISHED, Tolerance, papers, read_paper, table_named
from spinlab.report.rows import command, has_preset, row_config

TABLES = [(name, t) for paper in papers().values() for name, t in paper.tables.items()]
EXTENDING = Path(__file__).parent.parent.parent / "docs" / "extending.md"
WITHOUT_PRESET = {"longchat_7b", "unnamed"}  # of tables that are published only

BROKEN = {
    "an unknown entry": ("method: RTN", "metod: RTN", "rows[0] has an unknown entry 'metod': did"),
    "a missing entry": ("bits: 4-4-4, ", "", "rows[0] has no 'bits'"),
    "too few values": ("[1.0, 2.0]", "[1.0]", "values.toy has 1 of 2 values"),
    "no reason": ("ours: [method=rtn], ", "", "rows[0] needs `ours`, the words of our command, or"),
    "an unknown measure": ("{ppl: {w", "{pppl: {w", "tolerance: no measure is named pppl"),
    "no mapping": ("{ppl: {within: 0.1, why: seeds}}", "0.1", "rows[0].tolerance is no mapping"),
    "a twin": ("rows: [", "rows: [{method: RTN, bits: 4-4-4, why: x, values: {}}, ", "two rows"),
    "no YAML": ("rows: [", "rows: {[", "paper.yaml cannot be read: "),
}
WHOLE = """
title: A paper
arxiv: "0000.00000"
tables:
  first:
    title: All
    read: page 1
    measures: {ppl: {title: ppl, metric: ppl/wiki}, c4: {title: c4, metric: ppl/c4}}
    rows: [{method: RTN, bits: 4-4-4, ours: [method=rtn], values: {toy: [1.0, 2.0]},
            tolerance: {ppl: {within: 0.1, why: seeds}}}]
"""


def test_every_file_is_whole_and_every_table_has_a_name_of_its_own():
    assert {path.stem for path in PUBLISHED.glob("*.yaml")} == papers().keys()
    assert {"spinquant", "quarot", "duquant", "llmc", "qjl", "gptaq", "resq"} <= papers().keys()
    assert {"ostquant", "flatquant", "kurtail"} <= papers().keys()
    assert set(Counter(name for name, _ in TABLES).values()) == {1}
    for name, table in TABLES:
        assert table.read and table.rows, name
        for row in table.rows:
            for measure in table.measures.values():
                known = measure.metric in ("zeroshot", "ppl/wikitext2") or measure.unlike
                assert known, (name, measure)
            absent = {model for model in row.values if not has_preset(model)}
            assert absent <= WITHOUT_PRESET and not (absent and row.ours), (name, row.method)


def test_spinquants_first_table_has_what_is_published_only_and_what_conflicts():
    _, table = table_named("spinquant_1")
    rows = [(row.method, row.bits) for row in table.rows]
    assert rows.count(("LLM-QAT", "4-4-4")) == 1
    assert all(not row.ours for row in table.rows if row.method == "LLM-QAT")
    twice = [row for row in table.rows if (row.method, row.bits) == ("SpinQuant had", "4-4-4")]
    assert [row.values["llama3_8b"] for row in twice] == [(65.2, 7.3), (65.5, 7.3)]
    (had,) = (row for row in twice if not row.read)
    found = command(table, had, "llama2_7b")
    assert found == "spinlab +experiment=paper model=llama2_7b eval=spinquant method=spinquant_had"


@pytest.mark.parametrize("name, table", TABLES, ids=[name for name, _ in TABLES])
def test_every_rows_command_composes_to_the_papers_protocol_and_bits(name, table):
    for row in table.rows:
        if not row.ours:
            continue
        told = command(table, row, next(iter(row.values)))
        assert told == shlex.join(shlex.split(told)), "not for a shell"
        config = row_config(table, row, next(iter(row.values)))
        if row.variant == "fp":
            continue
        for setting, value in {**table.protocol, **row.protocol}.items():
            assert attrgetter(setting)(config) == value, (row.method, row.bits, setting)
        quant, kv = config.quant, config.kv
        bits = (quant.weights.bits, quant.activations.bits, kv.keys.bits, kv.values.bits)
        weights, activations, cache = row.bits.split("-")
        keys, _, values = cache.replace("?", "4").partition("/")
        expected = (weights, activations, keys, values or keys)
        assert bits == tuple(map(int, expected)), (row.method, row.bits)


def test_suites_of_papers_name_a_metric_for_each_of_their_tasks():
    sizes = {"quarot": 6, "spinquant": 8, "ostquant": 9, "duquant": 6}
    tables = dict(TABLES)
    for suite, name in zip(
        sizes, ("quarot_zeroshot", "spinquant_1", "ostquant_1", "duquant_main"), strict=True
    ):
        assert suite in options_of("eval")
        measured = row_config(tables[name], tables[name].rows[-1], "llama2_7b").eval
        assert len(measured.tasks) == len(set(measured.tasks)) == sizes[suite]
        assert set(measured.tasks) <= measured.task_metrics.keys()
        assert measured.limit is None


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_refused_with_one_sentence(how, tmp_path):
    old, new, sentence = BROKEN[how]
    path = tmp_path / "paper.yaml"
    path.write_text(WHOLE)
    assert read_paper(path).tables["first"].rows[0].values == {"toy": (1.0, 2.0)}
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(InputError) as refused:
        read_paper(path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_page_of_additions_shows_a_whole_file(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), re.S)
    (tmp_path / "paper.yaml").write_text(block)
    (table,) = read_paper(tmp_path / "paper.yaml").tables.values()
    config = row_config(table, table.rows[0], "llama2_7b")
    assert config.quant.activations.symmetric is table.protocol["quant.activations.symmetric"]


def test_an_unknown_table_is_told_with_the_nearest_names():
    with pytest.raises(InputError, match="unknown table 'spinqant_1': did you mean spinquant_1"):
        table_named("spinqant_1")


def test_a_perplexity_may_be_off_by_a_share_either_way_an_accuracy_by_points():
    tolerance = Tolerance(0.25, "")
    assert tolerance.holds("ppl/wiki", 5.0, 4.0) and tolerance.holds("ppl/wiki", 4.0, 5.0)
    assert not tolerance.holds("ppl/wiki", 5.1, 4.0)
    assert not tolerance.holds("ppl/wiki", 3.9, 5.0)
    assert tolerance.holds("zeroshot", 64.2, 64.4)
    assert not tolerance.holds("zeroshot", 64.2, 64.5)
