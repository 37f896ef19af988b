"""The tables of what recipes take on paper."""

import pytest

from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.report.tables.estimates import estimates_table

GIB = 2**30
CASES = {
    "quarot/1/offload": {"rotate": (3, 1, 8, 100), "weights": (20, 30, 4, 3600)},
    "quarot/8/offload": {"rotate": (3, 1, 8, 100), "weights": (12, 30, 4, 500)},
    "duquant/1/offload": {"rotate": (3, 1, 8, 2), "weights": (2.5, 200, 4, 1)},
    "duquant/8/offload": {"rotate": (3, 1, 8, 2), "weights": (2.5, 200, 4, 1)},
}


@pytest.fixture
def file(tmp_path):
    metrics = {}
    for about, stages in CASES.items():
        metrics[f"bytes/{about}/disk"] = 7 * GIB
        metrics[f"bytes/{about}/load/host"] = GIB  # reads, and multiplies nothing
        metrics[f"bytes/{about}/load/device"] = 0
        for stage, (device, host, moved, seconds) in stages.items():
            sides = {"device": device, "host": host, "moved": moved}
            metrics |= {f"bytes/{about}/{stage}/{n}": count * GIB for n, count in sides.items()}
            metrics[f"speed/{about}/{stage}"] = seconds
    config = {"gpus": [1, 8], "recipes": ["quarot", "duquant"]}
    record = {"experiment": "bench/estimates/m", "environment": {}, "config": config}
    write_json(tmp_path / "a.json", {**record, "metrics": metrics})
    return tmp_path / "a.json"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]


def test_a_recipes_row_has_its_largest_stages_and_the_time_of_all(file):
    head, _, *rows = cells(estimates_table(file, "offload"))
    assert head[:3] == ["recipe", "device, GiB (1 GPU)", "device, GiB (8 GPUs)"]
    assert head[3:] == [
        "host, GiB",
        "disk, GiB",
        "to the GPU, GiB",
        "time (1 GPU)",
        "time (8 GPUs)",
    ]
    assert rows == [
        ["`quarot`", "20.0 `weights`", "12.0 `weights`", "30.0 `weights`", "7.0", "12.0", "62 min",
         "10 min"],
        ["`duquant`", "3.0 `rotate`", "3.0 `rotate`", "200 `weights`", "7.0", "12.0", "3 s", "3 s"],
    ]  # fmt: skip


def test_the_stages_of_a_recipe_stand_in_the_order_of_a_run(file):
    head, _, *rows = cells(estimates_table(file, "offload", "quarot"))
    assert head[0] == "stage" and "disk, GiB" not in head
    assert rows == [
        ["`rotate`", "3.0", "3.0", "1.0", "8.0", "100 s", "100 s"],
        ["`weights`", "20.0", "12.0", "30.0", "4.0", "60 min", "8.3 min"],
    ]


@pytest.mark.parametrize("words", [("whole",), ("offload", "wush")])
def test_what_was_not_estimated_is_refused(file, words):
    with pytest.raises(InputError, match="has no estimates of"):
        estimates_table(file, *words)


def test_a_record_of_something_else_is_refused(tmp_path):
    record = {"experiment": "bench/cpu", "environment": {}, "metrics": {"time/x": 1}}
    write_json(tmp_path / "a.json", record)
    with pytest.raises(InputError, match="is no record of what recipes take on paper"):
        estimates_table(tmp_path / "a.json", "offload")
