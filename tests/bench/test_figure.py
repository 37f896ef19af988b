"""The figure of a benchmark stands beside its record, and is never what ends one."""

from spinlab.bench.__main__ import _draw


def test_ratios_are_drawn_beside_the_record_and_none_are_no_reason_to_fail(tmp_path, capsys):
    record = {"experiment": "bench/cpu", "environment": {"gpu": None}}
    _draw({**record, "metrics": {"speedup/cpu/linear": 2.5}}, tmp_path / "cpu.json")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    _draw({**record, "metrics": {"speed/cpu/linear": 2.5}}, tmp_path / "none.json")
    assert not (tmp_path / "none.png").exists()
    assert "no figure: bench/cpu: CPU has no ratios" in capsys.readouterr().err
