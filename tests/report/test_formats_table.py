"""Formats by rotations and rounding: every record is in the cell that its settings say."""

import numpy as np
import pytest

from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.report.tables.formats import formats_sheet, formats_table
from tests.report.conftest import composed_once

BITS = {"mxfp4": 4.25, "nvfp4": 4.5, "w4a4_g32": 5.0}
# format, rotation, rounding, seeds
RUNS = [
    ("nvfp4", "none", "rtn", 1),
    ("nvfp4", "input_blocks", "gptq", 3),
    ("mxfp4", "r1_blocks", "rtn_fixed", 2),
    ("mxfp4", "r1_blocks", "rtn", 2),
    ("mxfp4", "none", "qronos", 2),
    ("w4a4_g32", "hadamard", "gptaq", 2),
]
TITLES = {"mxfp4": "MXFP4", "nvfp4": "NVFP4", "w4a4_g32": "INT4, groups of 32"}
TURNS = {
    **{"none": "none", "hadamard": "R1, R2, R4"},
    "r1_blocks": "R1 in blocks of 32, R2, R4 in blocks of 32",
    "input_blocks": "blocks of 32 before inputs",
}
COLUMNS = ["rtn_fixed", "rtn", "gptq", "gptaq", "qronos"]
METHODS = ["RTN, whole range", "RTN", "GPTQ", "GPTAQ", "Qronos"]


def metrics_of(number: int, seed: int) -> dict[str, float]:
    drawn = np.random.default_rng([number, seed])
    return {
        **{f"ppl/{text}/fake": drawn.uniform(10, 20) for text in ("wiki", "c4")},
        **{f"kl/{text}/fake": drawn.uniform(0, 1) for text in ("wiki", "c4")},
        "zeroshot_mean/accuracy/fake": drawn.uniform(0.3, 0.5),
        "zeroshot_mean/stderr/fake": 0.01,
        **{"zeroshot_mean/accuracy/fp": 0.55, "zeroshot_mean/stderr/fp": 0.01, "ppl/wiki/fp": 9.75},
        "ppl/c4/fp": 28.0,
        "bits/weights/fake": BITS[RUNS[number][0]],
    }


@pytest.fixture
def records(tmp_path, save):
    for number, (format, rotation, rounding, seeds) in enumerate(RUNS):
        chosen = [f"quant={format}", f"rotation={rotation}", f"weights={rounding}"]
        for seed in range(seeds):
            config = composed_once("+experiment=formats", "model=toy", *chosen, f"seed={seed}")
            name = f"{format}_{rotation}_{rounding}"
            assert config.name == f"formats/toy/{name}"
            save(f"formats/{name}_seed{seed}.json", config, metrics_of(number, seed))
    return tmp_path / "formats"


@pytest.mark.parametrize(
    ("metric", "digits"), [("ppl/wiki", 2), ("kl/c4", 3), ("zeroshot_mean/accuracy", 1)]
)
def test_a_cell_is_that_of_its_settings_and_rows_come_by_bits(records, metric, digits):
    head, *rows = formats_sheet(records, metric).rows
    assert head == ["format", "bits", "rotation", *METHODS]
    places = [("mxfp4", "r1_blocks"), ("mxfp4", "none"), ("nvfp4", "none")]
    places += [("nvfp4", "input_blocks"), ("w4a4_g32", "hadamard")]
    expected = {place: [""] * len(COLUMNS) for place in places}
    for number, (format, rotation, rounding, seeds) in enumerate(RUNS):
        runs = [metrics_of(number, seed)[f"{metric}/fake"] for seed in range(seeds)]
        values = np.array(runs) * (100 if metric.startswith("zeroshot") else 1)
        if metric.startswith("zeroshot"):
            cell = f"{values.mean():.1f} ± 1.0"
        elif seeds == 1:
            cell = f"{values[0]:.{digits}f}"
        else:
            cell = f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
        expected[format, rotation][COLUMNS.index(rounding)] = cell
    told = {(TITLES[f], f"{BITS[f]:.2f}", TURNS[r]): cells for (f, r), cells in expected.items()}
    assert {tuple(row[:3]): row[3:] for row in rows} == told
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    firsts = {row[0]: row[2] for row in reversed(rows)}
    assert firsts["MXFP4"] == firsts["NVFP4"] == "none"


@pytest.mark.parametrize("asked", [0, 1])
def test_seeds_that_were_asked_no_questions_count_for_texts_alone(records, save, caplog, asked):
    """Other settings must be alike: windows of all, questions of those that were asked any."""
    chosen = "+experiment=formats", "model=toy", "quant=nvfp4", "rotation=none", "weights=rtn"
    silent = "eval.tasks=[]"
    for seed, *words in (
        (asked,),
        (1 - asked, silent),
        (2, silent, "eval.max_windows=3"),
        (3, "eval.limit=10"),
    ):
        metrics = metrics_of(0, seed)
        if silent in words:
            metrics = {k: v for k, v in metrics.items() if not k.startswith("zeroshot")}
        config = composed(*chosen, f"seed={seed}", *words)
        save(f"formats/nvfp4_none_rtn_seed{seed}.json", config, metrics)

    def cell(metric):
        rows = formats_sheet(records, metric).rows
        return next(row[3 + 1] for row in rows if row[0] == "NVFP4" and row[2] == "none")

    accuracy = metrics_of(0, asked)["zeroshot_mean/accuracy/fake"]
    assert cell("zeroshot_mean/accuracy") == f"{100 * accuracy:.1f} ± 1.0"
    texts = np.array([metrics_of(0, seed)["kl/wiki/fake"] for seed in (0, 1)])
    assert cell("kl/wiki") == f"{texts.mean():.3f} ± {texts.std(ddof=1):.3f}"
    assert "seed2.json is left out: unlike others of its row: eval.max_windows" in caplog.text
    told = f"eval.limit is not that of nvfp4_none_rtn_seed{asked}.json"
    assert f"seed3.json is left out: unlike others of its row: {told}" in caplog.text


def test_the_original_is_told_below(records):
    for metric, told in {
        "ppl/wiki": "wiki ppl; the original's is 9.75.",
        "kl/wiki": "wiki KL.",
        "zeroshot_mean/accuracy": "zero-shot; the original's is 55.0 ± 1.0.",
    }.items():
        assert formats_table(records, metric).endswith(f"\n\n- {told}")


def test_what_would_be_in_one_cell_is_told_and_so_is_an_unknown_metric(records, save):
    config = composed("+experiment=formats", "model=toy", "quant=nvfp4", "rotation=none")
    save("formats/more_seed0.json", config, metrics_of(0, 1))
    with pytest.raises(InputError, match=r"nvfp4_none_rtn is a second one of `NVFP4; none; RTN`"):
        formats_sheet(records)
    with pytest.raises(InputError, match=r"no record has kl/wikki: did you mean kl/wiki"):
        formats_sheet(records, "kl/wikki")


def test_gains_that_were_folded_for_nothing_are_told(records, save):
    words = "+experiment=formats", "model=toy", "quant=nvfp4", "rotation=none", "weights=rtn"
    config = composed(*words, "rotation.gains=folded")
    save("formats/more_seed0.json", config, metrics_of(0, 1))
    assert {row[2] for row in formats_sheet(records).rows} >= {"none", "none, gains folded"}


def test_a_record_of_an_older_schema_is_told(records, save):
    config = composed("+experiment=formats", "model=toy", "quant=mxfp4", "rotation=wush")
    save("formats/old_seed0.json", config, metrics_of(2, 0), schema=1)
    with pytest.raises(InputError, match=r"formats/toy/mxfp4_wush_rtn has schema 1"):
        formats_sheet(records)
