"""The table of what stages hold."""

import pytest

from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.report.tables.memory import memory_table

METRICS = {
    **{"bytes/start/host": 2**30, "bytes/checkpoint": 5},
    **{"bytes/eval-fp/host": 3 * 2**29, "bytes/eval-fp/device": 2**31, "speed/eval-fp": 9.6},
    **{"bytes/rotate/host": 2**32, "speed/rotate": 1.2},
}


def test_every_stage_has_a_row_in_the_order_of_a_run(tmp_path):
    record = {"experiment": "bench/memory/x", "environment": {}, "metrics": METRICS}
    write_json(tmp_path / "a.json", record)
    _, _, *rows = memory_table(tmp_path / "a.json").splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells == [
        ["before", "—", "1.0", "—"],
        ["`rotate`", "—", "4.0", "1"],
        ["`eval-fp`", "2.0", "1.5", "10"],
    ]


def test_a_record_of_something_else_is_refused(tmp_path):
    record = {"experiment": "bench/cpu", "environment": {}, "metrics": {"time/x": 1}}
    write_json(tmp_path / "a.json", record)
    with pytest.raises(InputError, match="is no record of what stages hold"):
        memory_table(tmp_path / "a.json")
