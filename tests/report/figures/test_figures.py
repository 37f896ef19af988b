"""What figures show is what they were given, and what runs and records hold."""

import inspect
import json
import logging
import shlex
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import save_file

from spinlab.errors import InputError
from spinlab.report import __main__ as report
from spinlab.report.figures import KINDS, described, figure_file, make_figure, read_words
from spinlab.report.figures.bars import draw_ratios, draw_shares
from spinlab.report.figures.curves import curve_of, draw_curves
from spinlab.report.figures.groups import group_of
from spinlab.report.figures.layers import draw_layers, layers
from spinlab.report.figures.outliers import _pooled, draw_outliers, draw_surfaces
from spinlab.report.figures.spread import draw_spread, seed_variance
from spinlab.report.figures.steps import draw_steps, duquant, example
from spinlab.report.figures.tradeoff import bits, draw_points, speed

EXPERIMENTS = Path(__file__).parent.parent.parent.parent / "experiments"


def write_record(path: Path, r1: str, seed: int, ppl: float, **more) -> Path:
    """A record with what figures read of one."""
    config = {"seed": seed, "rotation": {"r1": r1}, "model": {"name": "toy"}}
    metrics = {"ppl/wiki/fake": ppl, "ppl/wiki/fp": 5.0, "bits/weights/fake": 4.0 + seed}
    record = {
        "schema": 3, "experiment": "sweeps/toy", "config": config, "metrics": metrics, "stages": [],
        "status": "complete", **more,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two kinds of rotations with two seeds each, one run that failed and one that is broken."""
    folder = tmp_path / "sweep"
    for number, (r1, seed, ppl) in enumerate(
        [("random", 0, 9.0), ("random", 1, 8.0), ("hadamard", 0, 6.0), ("hadamard", 1, 7.0)]
    ):
        write_record(folder / str(number) / "record.json", r1, seed, ppl)
    write_record(folder / "4" / "record.json", "random", 2, 99.0, status="failed: InputError")
    (folder / "5").mkdir()
    (folder / "5" / "record.json").write_text("{")
    return folder


@pytest.fixture
def run(tmp_path) -> tuple[Path, Path]:
    """The folder of a run and the cache of its stages."""
    stages = [{"name": "outliers", "key": "abc"}]
    folder, cache = tmp_path / "run", tmp_path / "cache"
    write_record(folder / "record.json", "hadamard", 0, 6.0, stages=stages)
    (cache / "outliers-abc").mkdir(parents=True)
    peaks = {"before": np.array([[1.0, 2.0], [1.0, 9.0]]), "init": np.ones((2, 2))}
    save_file(peaks, cache / "outliers-abc" / "peaks.safetensors")
    inputs = {"before": np.arange(6.0).reshape(3, 2), "layer": np.array(1)}
    save_file(inputs, cache / "outliers-abc" / "inputs.safetensors")
    steps = [{"step": n, "loss": 3.0 - n, "lr": 0.1, "orthogonality/r1": 1e-7} for n in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    measured = {
        "outliers/before": [2.0, 9.0],
        "outliers/init": [1.0, 1.5],
        "error/fake": [0.1, 0.2],
    }
    (folder / "layers.json").write_text(json.dumps(measured))
    return folder, cache


def lines(axis) -> dict[str, list[float]]:
    """What the lines of an axis hold, by their labels."""
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def points(axis) -> list[list[float]]:
    """What is drawn as points that no line joins."""
    return [list(line.get_ydata()) for line in axis.lines if line.get_linestyle() == "None"]


def test_profiles_hold_the_magnitudes_of_their_channels():
    given = {"before": np.array([1.0, 8.0, 2.0]), "after": np.array([3.0, 3.0, 4.0])}
    axes = draw_outliers(given, "layer 3").figure.axes
    for axis, values in zip(axes, given.values(), strict=True):
        (lines,) = axis.collections
        ends = [segment.tolist() for segment in lines.get_segments()]
        assert ends == [[[n, 0], [n, value]] for n, value in enumerate(values)]
    assert axes[0].get_ylim() == axes[1].get_ylim()


@pytest.mark.parametrize("channels", [100, 576, 4096])
def test_a_single_peak_is_seen_however_many_channels_there_are(channels, tmp_path):
    magnitudes = np.ones(channels)
    magnitudes[channels // 3] = 20
    profiles = {name: magnitudes for name in ("before", "init", "learned")}
    drawing = draw_outliers(profiles, "layer 3")
    image = imread(drawing.save(tmp_path / "a.png"))[:, :, :3].mean(2)
    for axis in drawing.figure.axes:
        left, top = axis.transData.transform((0, 15))
        right, _ = axis.transData.transform((channels, 15))
        row = image[len(image) - int(top), int(left) + 3 : int(right)]
        assert row.min() < 0.6  # half-way up the peak there is ink


def test_a_surface_keeps_every_peak_however_many_cells_there_are():
    x = np.zeros((1000, 700))
    x[717, 333] = -50.0
    tokens, channels, heights = _pooled(np.abs(x))
    assert heights.shape == (len(tokens), len(channels)) == (64, 96)
    (row,), (column,) = np.nonzero(heights)
    assert heights[row, column] == 50
    assert tokens[row] <= 717 < tokens[row + 1]
    assert channels[column] <= 333 < channels[column + 1]
    small = np.random.default_rng(0).random((5, 7))
    assert np.array_equal(_pooled(small)[2], small)
    (axis,) = draw_surfaces({"before": x}, "layer 3").figure.axes
    assert axis.get_zlim() == (0, 50)


def test_the_example_of_duquant_shows_its_numbers():
    steps = list(example().values())
    assert [round(np.abs(x).max(), 4) for x in steps] == [10.2, 7.3893, 5.8855]
    axes = duquant().figure.axes
    for axis, x in zip(axes, steps, strict=True):
        assert np.array_equal(axis.images[0].get_array(), np.abs(x))
        assert [t.get_text() for t in axis.texts] == [f"{value:.2f}" for value in x.flatten()]
    assert "5.89" in axes[-1].get_title()


def test_wide_matrices_are_drawn_below_each_other():
    axes = draw_steps({"a": np.eye(8), "b": 2 * np.eye(8)}).figure.axes
    assert axes[0].get_subplotspec().rowspan.start < axes[1].get_subplotspec().rowspan.start


def test_boxes_span_the_quartiles_and_every_point_is_shown():
    groups = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [7.0]}
    (axis,) = draw_spread(groups, "perplexity").figure.axes
    box = axis.patches[0].get_path().vertices[:, 1]
    assert (box.min(), box.max()) == (2.0, 4.0)
    assert points(axis) == list(groups.values())
    assert [t.get_text() for t in axis.get_xticklabels()] == ["a\nn = 5", "b\nn = 1"]


def test_seed_variance_is_that_of_the_complete_records_of_a_folder(sweep, caplog):
    (axis,) = seed_variance(str(sweep)).figure.axes
    assert points(axis) == [[6.0, 7.0], [9.0, 8.0]]  # hadamard, random
    assert axis.get_ylabel() == "wiki perplexity"
    assert "not complete" in caplog.text
    assert "broken" in caplog.text


def test_networks_of_a_text_have_boxes_of_the_records_that_measured_them(tmp_path):
    for seed, (init, fake) in enumerate(((9.0, 6.0), (8.0, 7.0))):
        write_record(tmp_path / f"a_seed{seed}.json", "hadamard", seed, fake)
        record = json.loads((tmp_path / f"a_seed{seed}.json").read_text())
        record["metrics"]["ppl/wiki/init"] = init
        (tmp_path / f"a_seed{seed}.json").write_text(json.dumps(record))
    write_record(tmp_path / "b_seed0.json", "random", 0, 5.0)
    (axis,) = seed_variance(str(tmp_path), "ppl/wiki/init,ppl/wiki/fake").figure.axes
    names = [text.get_text().split("\n")[0] for text in axis.get_xticklabels()]
    assert names == ["hadamard, init", "hadamard, fake", "random, fake"]
    assert points(axis) == [[9.0, 8.0], [6.0, 7.0], [5.0]]
    for wrong in ("ppl/wiki/fake,ppl/c4/fake", "ppl/wiki/fake, ppl/wiki/fake"):
        with pytest.raises(InputError, match="several must be of one text"):
            seed_variance(str(tmp_path), wrong)


def test_a_figure_takes_records_of_any_name_and_of_all_folders(sweep, tmp_path, caplog):
    write_record(tmp_path / "other" / "best_seed0.json", "hadamard", 0, 5.5)
    write_record(sweep / "kept_seed9.json", "random", 9, 9.5)
    (sweep / "sweep.json").write_text('{"words": [], "points": []}')
    (axis,) = seed_variance(f"{sweep},{tmp_path / 'other'}").figure.axes
    assert points(axis) == [[5.5, 6.0, 7.0], [9.0, 8.0, 9.5]]
    assert "2 runs of by=rotation.r1, hadamard, have the seed 0" in caplog.text
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not any("sweep.json" in line for line in told)


def test_groups_are_called_as_a_command_line_has_their_settings():
    record = {"experiment": "a", "config": {"learn": {"steps": None, "kl": True, "lr": 0.5}}}
    names = ["learn.steps", "learn.kl", "learn.lr", "experiment"]
    assert group_of(record, names) == "null, true, 0.5, a"


def test_curves_hold_loss_with_its_terms_and_every_rotation():
    curve = [
        {"loss": 3.0, "kl": 1.0, "lr": 9.0, "orthogonality/r1": 1e-7, "orthogonality/r2": 2e-7}
    ]
    loss, drift = draw_curves({"run": curve * 3}).figure.axes
    assert lines(loss) == {"loss": [3.0] * 3, "kl": [1.0] * 3}
    assert lines(drift) == {"r1": [1e-7] * 3, "r2": [2e-7] * 3}
    loss, drift = draw_curves({"a": curve, "b": curve}).figure.axes
    assert lines(loss) == {"a": [3.0], "b": [3.0]}
    assert lines(drift) == {"a": [2e-7], "b": [2e-7]}


def test_a_curve_ends_where_a_kill_cut_its_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    assert [step["loss"] for step in curve_of(tmp_path)] == [2.0]
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has no steps"):
        curve_of(tmp_path)


def test_layers_of_a_run_are_those_of_its_file(run):
    axes = layers(str(run[0])).figure.axes
    expected = {"before rotation": [2.0, 9.0], "initial rotation": [1.0, 1.5]}
    assert [lines(axis) for axis in axes] == [expected, {"fake": [0.1, 0.2]}]


def test_layers_hold_outliers_and_errors():
    outliers, errors = {"before": [2.0, 9.0], "after": [1.0, 1.5]}, {"fake": [0.1, 0.2]}
    axes = draw_layers(outliers, errors).figure.axes
    assert [lines(axis) for axis in axes] == [outliers, errors]


def test_points_are_bits_or_relative_speed_against_quality(sweep, tmp_path):
    (axis,) = bits(str(sweep), by="rotation.r1").figure.axes
    found = {line.get_label(): [list(d) for d in line.get_data()] for line in axis.lines}
    assert found == {"hadamard": [[4, 5], [6, 7]], "random": [[4, 5], [9, 8]]}
    timed = {"speed/cpu/decode/fp32/seconds_per_token": 0.6, "speed/cpu/decode/int4_kv4": 0.2}
    bench = tmp_path / "bench.json"
    made = {"experiment": "bench", "environment": {}, "metrics": timed}
    bench.write_text(json.dumps({**made, "config": {"model": "toy"}}))
    (axis,) = speed(str(sweep), str(bench), by="rotation.r1").figure.axes
    found = {line.get_label(): [list(d) for d in line.get_data()] for line in axis.lines}
    assert found["original"] == [[1], [5]]
    assert found["random"] == [[pytest.approx(3)] * 2, [9, 8]]
    with pytest.raises(InputError, match=r"has no speed/gpu/fp32; there are speed/cpu/decode"):
        speed(str(sweep), str(bench), case="gpu")
    bench.write_text(json.dumps({**made, "config": {"model": "llama2_7b"}}))
    with pytest.raises(InputError, match=r"timed llama2_7b, and the records are of toy"):
        speed(str(sweep), str(bench))


def test_codecs_are_points_of_their_families_for_each_text(tmp_path):
    """One that codes nothing is no point; families look the same in every panel."""
    codecs = [("affine", 4.4, 0.1), ("qjl", 3.5, 0.9), ("affine", 2.4, 0.8), ("affine", 16.0, 0.0)]
    for number, (codec, size, kl) in enumerate(codecs):
        metrics = {"bits/kv/fake": size, "bits/weights/fake": 16.0, "ppl/wiki/fake": 9.0}
        metrics |= {"kl/c4/fake": 2 * kl} | ({"kl/wiki/fake": kl} if number != 1 else {})
        config = {"seed": 0, "kv": {"keys": {"codec": codec}}, "model": {"name": "toy"}}
        path = tmp_path / str(number) / "record.json"
        write_record(path, "none", 0, 9.0, metrics=metrics, config=config)
    words = {"metric": "kl/wiki/fake,kl/c4/fake", "by": "kv.keys.codec", "of": "kv"}
    axes = bits(str(tmp_path), **words).figure.axes
    found = [{line.get_label(): line.get_xydata().tolist() for line in a.lines} for a in axes]
    affine = np.array([[4.4, 0.1], [2.4, 0.8]])
    assert found[0] == {"affine": affine.tolist()}  # the other has no KL of this text
    twice = {"affine": (affine * [1, 2]).tolist(), "qjl": [[3.5, 1.8]]}
    assert found[1] == twice
    looks = [{a.lines[0].get_marker(), a.lines[0].get_color()} for a in axes]
    assert looks[0] == looks[1]
    assert [text.get_text() for text in axes[0].figure.legends[0].texts] == ["affine", "qjl"]
    assert [a.get_ylabel() for a in axes] == [
        f"{text} KL divergence to the original" for text in ("wiki", "c4")
    ]
    with pytest.raises(InputError, match=r"of=inputs has no bits: choose one of weights, kv"):
        bits(str(tmp_path), of="inputs")
    with pytest.raises(InputError, match="no record has the metrics bits/weights/fake, ppl/wiki"):
        bits(str(tmp_path))  # of weights all have 16


def test_many_groups_keep_their_markers_apart():
    (axis,) = draw_points({str(n): [(n, n)] for n in range(16)}, "x", "y").figure.axes
    assert len({(line.get_marker(), line.get_fillstyle()) for line in axis.lines}) == 16


def test_bars_hold_ratios_by_kind_and_shares_in_percent():
    metrics = {"speedup/a": 2.0, "speedup/b": 0.5, "ratio/c": 1.5, "speed/a": 9.0}
    axes = draw_ratios(metrics, "cpu").figure.axes
    assert [[bar.get_width() for bar in axis.patches] for axis in axes] == [[0.5, 2.0], [1.5]]
    (axis,) = draw_shares({"norms": 0.25, "products": 0.75}, "a step").figure.axes
    assert [bar.get_width() for bar in axis.patches] == [25, 75]
    with pytest.raises(InputError, match="cpu has no ratios"):
        draw_ratios({"speed/a": 1.0}, "cpu")


def test_every_kind_is_drawn_by_a_command(run, sweep, time_network, tmp_path, capsys):
    folder, cache = run
    bench = str(EXPERIMENTS / "bench" / "cpu.json")
    smollm2 = str(EXPERIMENTS / "quality" / "smollm2_135m")
    words = {
        "outliers": [f"run={folder}", f"cache={cache}"],
        "surface": [f"run={folder}", f"cache={cache}"],
        "duquant": [],
        "seed_variance": [f"records={sweep}", "metric=ppl/wiki/fp", "by=experiment"],
        "curves": [f"run={folder}"],
        "layers": [f"run={folder}"],
        "bits": [f"records={sweep}"],
        "speed": [f"records={smollm2}", f"bench={bench}"],
        "pareto": [f"records={smollm2}", f"speeds={time_network('decode', None, {'b1': 3.0})}"],
        "ablation": [f"records={smollm2}", "methods=learned_blocks,learned_inputs"],
        "ratios": [f"record={bench}"],
        "shares": [f"record={EXPERIMENTS / 'bench' / 'learn_llama2_7b_h100.json'}"],
    }
    assert words.keys() == KINDS.keys()
    for kind, more in words.items():
        assert f"figure={kind} " in described()
        out = tmp_path / "made" / f"{kind}.pdf"
        report.main([f"figure={kind}", *more, f"out={out}"])
        assert capsys.readouterr().out.strip() == str(out)
        assert out.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure=curvs", "out=a.png"], "figure=curvs is unknown: did you mean curves"),
        (["figure=curves", "out=a.png"], "figure=curves needs run="),
        (["figure=duquant"], "figure=duquant needs out="),
        (["figure=curves", "ran=x", "out=a.png"], "curves does not read ran=: did you mean run"),
        (["figure=duquant", "out="], "'out=' is no key=value"),
        (["figure=duquant", "out=a.svg"], r"out=a.svg: a figure is written as .png or .pdf"),
        (["figure=curves", "run=nowhere", "out=a.png"], "run=nowhere has no metrics.jsonl"),
        (["figure=layers", "run=nowhere", "out=a.png"], "run=nowhere has no layers.json"),
        (["figure=outliers", "run=nowhere", "out=a.png"], "record.json"),
        (["figure=bits", "records=nowhere", "out=a.png"], "records=nowhere is no folder"),
        (["figure=ratios", "record=nowhere", "out=a.png"], "record=nowhere is no record of a"),
        (
            ["figure=ratios", f"record={EXPERIMENTS / 'best_smollm2.json'}", "out=a.png"],
            "best_smollm2.json is no record of a benchmark: its experiment is missing",
        ),
    ],
)
def test_a_wrong_word_is_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        report.main(words)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_readme_draws_records_that_are_committed_or_that_its_first_command_makes():
    text = (EXPERIMENTS.parent / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "spinlab.report figure=" in line]
    assert len(lines) > 2
    for line in lines:
        words = read_words(shlex.split(line, comments=True)[3:])
        known = inspect.signature(KINDS[words["figure"]]).parameters
        assert words.keys() - known.keys() == {"figure", "out"}
        place = words.get("records", "runs/toy")
        assert place == "runs/toy" or (EXPERIMENTS.parent / place).is_dir()


def test_settings_and_metrics_that_records_lack_are_named(sweep):
    with pytest.raises(InputError, match=r"by=rotation.r9 is no setting"):
        seed_variance(str(sweep), by="rotation.r9")
    with pytest.raises(InputError, match="no record has the metrics ppl/c4/fake"):
        seed_variance(str(sweep), metric="ppl/c4/fake")


def test_a_stage_that_the_cache_lost_is_named(run):
    folder, cache = run
    (cache / "outliers-abc" / "peaks.safetensors").unlink()
    with pytest.raises(InputError, match=r"peaks.safetensors is not there: name the cache"):
        make_figure(["figure=outliers", f"run={folder}", f"cache={cache}", "out=a.png"])


def test_a_page_has_its_figure_beside_the_records(sweep):
    out = figure_file(sweep, "seed_variance", "spread.png", "by=rotation.r1")
    assert out == sweep.parent / "spread.png"
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="there is no figure spread"):
        figure_file(sweep, "spread", "spread.png")
    with pytest.raises(InputError, match="duquant is made of no record: draw it with figure="):
        figure_file(sweep, "duquant", "duquant.png")
