"""Pages hold the tables of their records, and a number enters them in no other way."""

import json
from pathlib import Path

import pytest

from spinlab.errors import InputError
from spinlab.report import tables
from spinlab.report.pages import make_files, pages, rebuilt

ROOT = Path(__file__).parent.parent.parent


def test_every_committed_table_is_that_of_its_records():
    found = pages(ROOT)
    assert {page.name for page in found} >= {"README.md", "methods_smollm2.md", "best_smollm2.md"}
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert rebuilt(text, ROOT) == text, f"{page.name}: make tables"


@pytest.mark.parametrize("old", ["", "old\n", "two\nlines\n"])
def test_only_the_tables_of_a_page_are_rebuilt(tmp_path, old):
    whole = {"schema": 2, "experiment": "a", "status": "complete", "config": {}}
    record = {**whole, "metrics": {"ppl/wiki/fp": 2.5}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    page = f"words\n<!-- table: record a.json -->\n{old}<!-- end -->\nmore <!-- end -->"
    made = rebuilt(page, tmp_path)
    table = tables.KINDS["record"](tmp_path / "a.json")
    assert "2.50" in table
    mark = "<!-- table: record a.json -->"
    assert made == f"words\n{mark}\n{table}\n<!-- end -->\nmore <!-- end -->"
    assert rebuilt(made, tmp_path) == made
    assert rebuilt("a page without marks", tmp_path) == "a page without marks"


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="kinds are record, methods, ablation, gap, paper"):
        rebuilt("<!-- table: recrod a.json -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize(
    ("words", "told"), [("gap a", "'baseline'"), ("gap", "'folder'"), ("record a b", "too many")]
)
def test_a_mark_with_other_words_than_its_kind_takes_is_refused(tmp_path, words, told):
    with pytest.raises(InputError, match=f"<!-- table: {words} -->: .*{told}"):
        rebuilt(f"<!-- table: {words} -->\n<!-- end -->", tmp_path)


def test_every_committed_file_of_a_page_is_made_anew_as_it_is():
    marks = [text for page in pages(ROOT) for text in page.read_text("utf-8").splitlines()]
    marked = [line for line in marks if "<!-- file: gap" in line]
    before = (ROOT / "experiments" / "best_smollm2.json").read_bytes()
    assert make_files("\n".join(marked), ROOT) == [ROOT / "experiments" / "best_smollm2.json"]
    assert (ROOT / "experiments" / "best_smollm2.json").read_bytes() == before


def test_pages_are_looked_for_everywhere_but_in_runs_and_hidden_folders(tmp_path):
    text = "<!-- table: record a.json -->\n<!-- end -->"
    for folder in ("runs", ".cache", "docs", "experiments/more"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "page.md").write_text(text)
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "plain.md").write_text("no marks")
    found = [str(page.relative_to(tmp_path)) for page in pages(tmp_path)]
    assert found == ["README.md", "docs/page.md", "experiments/more/page.md"]


def test_a_new_kind_is_a_function_and_a_line(tmp_path, monkeypatch):
    kinds = {"count": lambda folder: str(len(list(folder.iterdir())))}
    monkeypatch.setattr("spinlab.report.pages.KINDS", {**tables.KINDS, **kinds})
    (tmp_path / "a").mkdir()
    made = rebuilt("<!-- table: count a -->\n<!-- end -->", tmp_path)
    assert made == "<!-- table: count a -->\n0\n<!-- end -->"
