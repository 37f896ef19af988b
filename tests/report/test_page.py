"""The page of all records: what is in it, what is left out, and that nothing of it is run."""

import json
import re
import shlex

import pytest

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.report.__main__ import main
from spinlab.report.page import content
from spinlab.report.page.build import embedded, page_of, write_page
from spinlab.report.page.content import page_content

METRICS = {"ppl/wiki/fp": 9.0, "ppl/wiki/integer": 18.5, "bits/weights/integer": 4.05}
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 99


@pytest.fixture
def runs(save, tmp_path):
    """A folder with one run: its record, its curves and a figure."""
    home = save("runs/toy/key/record.json", Config(), METRICS).parent
    lines = [json.dumps({"step": step, "loss": 3.0 - step / 100}) for step in range(250)]
    (home / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (home / "layers.json").write_text(json.dumps({"outliers/before": [7.5, 8.0]}))
    (home / "figures").mkdir()
    (home / "figures" / "outliers.png").write_bytes(PNG)
    (home / "wandb").mkdir()
    (home / "wandb" / "rotations.json").write_text("{}")
    return tmp_path / "runs"


def data_of(page: str):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])


def test_a_run_is_shown_with_its_curves_figures_and_settings(runs):
    found = page_content([runs])
    (run,) = found.runs
    assert not found.left_out
    assert (run["id"], run["metrics"]) == ("runs/toy/key/record.json", METRICS)
    assert run["settings"]["rotation.r1"] == Config().rotation.r1
    steps, loss = run["curves"]["step"], run["curves"]["loss"]
    assert len(steps) == len(loss) <= content._POINTS
    assert (steps[0], steps[-1], loss[-1]) == (0, 249, 3.0 - 2.49)
    assert run["layers"] == {"outliers/before": [7.5, 8.0]}
    assert [figure["name"] for figure in run["figures"]] == ["outliers"]


def test_a_committed_record_has_the_figures_that_begin_with_its_name(save, tmp_path):
    save("experiments/best.json", Config(), METRICS)
    (tmp_path / "experiments" / "best_outliers.png").write_bytes(PNG)
    (run,) = page_content([tmp_path / "experiments"]).runs
    assert [figure["name"] for figure in run["figures"]] == ["best_outliers"]


def test_the_command_of_a_run_can_be_pasted_into_a_shell(save, tmp_path):
    words = ["+experiment=toy", "quant.overrides=[{layers: [0], weights: {bits: 8}}]"]
    save("runs/key/record.json", Config(), METRICS, overrides=words)
    (run,) = page_content([tmp_path / "runs"]).runs
    assert shlex.split(run["command"]) == ["spinlab", *words]


def test_what_is_broken_unfinished_or_foreign_is_named(runs, save, monkeypatch):
    home = runs / "toy" / "key"
    save("runs/toy/failed/record.json", Config(), METRICS, status="failed: no")
    (runs / "torn").mkdir()
    (runs / "torn" / "record.json").write_text('{"schema": 3, ')
    with (home / "metrics.jsonl").open("a") as file:
        file.write('{"step": 250, "lo')
    (home / "layers.json").write_text("[1, 2]")
    (home / "figures" / "foreign.png").write_bytes(b"<svg onload=alert(1)>")
    (home / "figures" / "large.png").write_bytes(PNG + b"0" * content._FIGURE_BYTES)
    found = page_content([runs])
    assert [run["id"] for run in found.runs] == ["runs/toy/key/record.json"]
    assert found.runs[0]["curves"]["step"][-1] == 249
    left = found.left_out
    assert left["runs/toy/failed/record.json"].startswith("not complete")
    assert left["runs/torn/record.json"].startswith("broken")
    assert left["runs/toy/key/record.json: metrics.jsonl"].startswith("broken behind 250 steps")
    assert left["runs/toy/key/record.json: layers.json"].startswith("broken")
    assert left["runs/toy/key/figures/foreign.png"] == "no PNG"
    assert left["runs/toy/key/figures/large.png"].startswith("too large")
    monkeypatch.setattr(content, "_FIGURES_BYTES", len(PNG) - 1)
    left = page_content([runs]).left_out
    assert left["runs/toy/key/figures/outliers.png"].startswith("too many figures")


def test_text_of_a_record_ends_no_element_and_comes_back_as_it_was():
    nasty = {"<!--": "</script><script>alert(1)</script>", "a&b": "\u2028'\"\ud800"}
    text = embedded(nasty)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == nasty


def test_the_page_allows_its_own_style_and_script_and_no_request():
    page = page_of({"runs": [], "left_out": {}, "variants": []}, "a <b>")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "<title>a &lt;b&gt;</title>" in page
    elsewhere = r"""(src|href)\s*=\s*["']|https?://(?!www\.w3\.org/2000/svg)|url\("""
    assert not re.search(elsewhere, page)


def test_a_curve_without_a_finite_value_is_told_as_text(runs):
    lines = [
        '{"step": 0, "loss": 2.5}',
        '{"step": 1, "loss": Infinity}',
        '{"step": 2, "loss": NaN}',
    ]
    (runs / "toy" / "key" / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = page_content([runs]).as_json()["runs"]
    assert run["curves"] == {"step": [0, 1, 2], "loss": [2.5, "inf", "nan"]}


def test_a_record_with_the_least_in_it_is_shown(save, tmp_path):
    path = save("runs/x/record.json", Config(), METRICS)
    least = {"schema": 1, "experiment": 3, "config": {}, "metrics": {}, "status": "complete"}
    path.write_text(json.dumps({**least, "environment": [], "stages": {"a": 1}, "overrides": None}))
    (run,) = page_content([tmp_path / "runs"]).runs
    assert (run["experiment"], run["command"], run["stages"]) == ("3", "spinlab", [])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_command_writes_the_page_and_says_what_is_in_it(save, tmp_path, capsys, count):
    (tmp_path / "runs").mkdir()
    for number in range(count):
        save(f"runs/{number}/record.json", Config(), METRICS)
    page = tmp_path / "report" / "index.html"
    main([f"page={page}", f"records={tmp_path / 'runs'}"])
    assert f"index.html: {count} run{'s' * (count != 1)}\n" in capsys.readouterr().out
    text = page.read_text()
    assert len(data_of(text)["runs"]) == count
    assert str(tmp_path) not in text


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        write_page([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*set page to"):
        write_page([], tmp_path / "file" / "index.html")
