"""The table of exports and of what their readers make of them."""

import pytest

from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.report.tables.exports import exports_table

METRICS = {
    "bytes/gguf": 2.5e6,
    "ratio/bytes/gguf": 0.25,
    "ppl/wiki/gguf/network": 9.5,
    "ppl/c4/gguf/network": 20.0,
    **{"ppl/wiki/gguf/transformers": 9.5, "ppl/c4/gguf/transformers": 20.25},
    **{"ppl/wiki/gguf/llama.cpp": 9.75, "ppl/c4/gguf/llama.cpp": 21.0},
    **{"logits_error/gguf/transformers": 0.0, "same_bits/gguf/transformers": 1.0},
    **{"logits_error/gguf/llama.cpp": 0.025, "same_bits/gguf/llama.cpp": 0.0},
}


def test_every_reader_of_an_export_has_a_row(tmp_path):
    words = ["eval.tasks=[]", "kv=kv16"]
    record = {"experiment": "bench/exports/x", "environment": {}, "overrides": words}
    write_json(tmp_path / "a.json", {**record, "metrics": METRICS})
    *_, llama, stock = exports_table(tmp_path).splitlines()
    cells = [cell.strip() for cell in llama.split("|")[1:-1]]
    assert cells[:5] == ["`kv=kv16`", "gguf", "2.5", "0.250", "llama.cpp"]
    assert cells[5:] == ["9.50", "9.75", "20.00", "21.00", "2.5% of their spread"]
    assert [cell.strip() for cell in stock.split("|")[-3:-1]] == ["20.25", "no bit"]


def test_a_folder_without_such_records_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no record of exports named x"):
        exports_table(tmp_path, "x")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="is no record of a benchmark: broken"):
        exports_table(tmp_path, "x")
