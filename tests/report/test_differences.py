"""What choices change, against numpy on the metrics themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.report.__main__ import main
from spinlab.report.pairs import log_differences, standard_error
from spinlab.report.tables.differences import differences_table

# perplexity and KL by text, a number for each seed
BASE = {
    "wiki_dev": ([23.0, 24.5, 22.1], [0.31, 0.35, 0.3]),
    "c4_dev": ([30.0, 31.5, 29.0], [0.4] * 3),
}
HELD = {
    "wiki_dev": ([24.0, 25.8, 23.2], [0.36, 0.4, 0.33]),
    "c4_dev": ([30.9, 32.0, 31.0], [0.5] * 3),
}


def save(folder: Path, name: str, values: dict, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    for seed in seeds:
        metrics = {"ppl/wiki_dev/fp": 20.58, "ppl/c4_dev/fp": 25.36}
        for text, (ppl, kl) in values.items():
            metrics |= {f"ppl/{text}/fake": ppl[seed], f"kl/{text}/fake": kl[seed]}
        whole = {"schema": 3, "experiment": name, "status": "complete", "config": {"seed": seed}}
        (folder / f"{name}_seed{seed}.json").write_text(json.dumps({**whole, "metrics": metrics}))


def cells(table: str) -> dict[str, list[str]]:
    """Return the rows of a Markdown table by their first cell, `head` the first."""
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line
    ]
    return {"head": rows[0], **{row[0]: row[1:] for row in rows[2:]}}


@pytest.fixture
def choices(tmp_path) -> Path:
    """A base and a choice of three seeds, and one of which the first seed alone is there."""
    save(tmp_path, "learned_blocks", BASE)
    save(tmp_path, "blocks_no_rotations", HELD)
    save(tmp_path, "blocks_kl", HELD, seeds=(0,))
    (tmp_path / "titles.yaml").write_text("blocks_no_rotations: learn.lr.inputs=0\n")
    return tmp_path


def test_a_difference_is_the_mean_over_pairs_of_seeds_with_its_standard_error(choices):
    found = cells(differences_table(choices, "learned_blocks", "blocks_no_rotations", "blocks_kl"))
    assert found["head"] == [
        *("method", "settings", "seeds", "wiki_dev ppl", "c4_dev ppl", "wiki_dev KL", "c4_dev KL"),
        *("wiki_dev difference", "c4_dev difference"),
    ]
    assert [*found][1:] == ["", "learned_blocks", "blocks_no_rotations", "blocks_kl"]
    assert found[""] == ["original", "", "20.58", "25.36", "—", "—", "", ""]
    differences, perplexities, divergences = [], [], []
    for text in BASE:
        ppl, kl = (np.array(values) for values in HELD[text])
        moved = np.log(ppl) - np.log(BASE[text][0])
        error = np.std(moved, ddof=1) / np.sqrt(3)
        differences.append(f"{moved.mean():+.3f} ± {error:.3f}")
        perplexities.append(f"{ppl.mean():.2f} ± {ppl.std(ddof=1):.2f}")
        spread = f" ± {kl.std(ddof=1):.3f}" if np.ptp(kl) else ""
        divergences.append(f"{kl.mean():.3f}{spread}")
    settings = ["learn.lr.inputs=0", "3"]
    assert found["blocks_no_rotations"] == [*settings, *perplexities, *divergences, *differences]
    assert found["learned_blocks"][-2:] == ["", ""]
    one = [f"{np.log(HELD[text][0][0] / BASE[text][0][0]):+.3f}" for text in BASE]
    assert found["blocks_kl"][1] == "1"
    assert found["blocks_kl"][-2:] == one


def test_a_choice_without_a_title_has_the_settings_in_which_it_differs(save, tmp_path):
    metrics = {"ppl/wiki/fp": 9.75, "ppl/wiki/fake": 10.5}
    for name, *words in (["base"], ["held", "learn.lr.scale=0", "rotation.blocks.size=16"]):
        words = ["+experiment=toy", "+method=learned_blocks", "seed=3", *words]
        save(f"{name}_seed3.json", composed(*words), metrics)
    found = cells(differences_table(tmp_path, "base", "held"))
    assert found["base"][0] == ""
    assert found["held"][0] == "learn.lr.scale=0 rotation.blocks.size=16"


def test_pairs_are_those_of_a_seed_in_whatever_order_records_come():
    def record(seed: int, ppl: float) -> dict:
        return {"config": {"seed": seed}, "metrics": {"ppl/wiki/fake": ppl}}

    rng = np.random.default_rng(0)
    base, shift, noise = np.exp(rng.normal(3, 1, 9)), 0.02, rng.normal(0, 0.001, 9)
    ours = base * np.exp(shift + noise)
    mixed = [record(seed, ours[seed]) for seed in rng.permutation(9)]
    found = log_differences(mixed, [record(n, p) for n, p in enumerate(base)], "wiki")
    assert sorted(found) == pytest.approx(sorted(shift + noise), abs=1e-12)
    # seeds differ a thousandfold more than what they share does
    error = standard_error(found)
    assert error == pytest.approx(np.std(noise, ddof=1) / 3)
    assert error < 1e-3 < np.std(np.log(ours), ddof=1)
    assert standard_error(found[:1]) is None


def test_a_missing_record_is_named(choices):
    with pytest.raises(InputError, match="no record is of 'blocks_no_scales'"):
        differences_table(choices, "learned_blocks", "blocks_no_scales")
    with pytest.raises(InputError, match="seed 1 has no record of blocks_kl, which has 0"):
        differences_table(choices, "blocks_kl", "blocks_no_rotations")


def test_the_table_is_there_for_records_of_ones_own(choices, capsys):
    words = ["table=differences", f"records={choices}", "format=csv"]
    main([*words, "methods=learned_blocks,blocks_kl"])
    head, original, base, row = capsys.readouterr().out.splitlines()
    assert head.startswith("method,settings,seeds,wiki_dev ppl")
    assert (original.split(",")[1], base.split(",")[0]) == ("original", "learned_blocks")
    assert row.endswith("+0.043,+0.030")
    with pytest.raises(SystemExit):
        main([*words, "methods=learned_blocks"])
    assert "table=differences needs methods=BASE,CHOICE" in capsys.readouterr().err
