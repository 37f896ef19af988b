"""Accuracy beside measured speed: the numbers of both kinds of records, and who lacks one."""

import math

import numpy as np
import pytest

from spinlab.errors import InputError
from spinlab.report.pages import rebuilt
from spinlab.report.tables.pareto import pareto_table
from tests.report.conftest import composed_once

# of two seeds: perplexity, KL, difference of zero-shot accuracy
SCORES = {
    "quarot": ((18.0, 17.5), (0.6, 0.62), (-0.06, -0.05)),
    "learned_blocks": ((10.6, 10.5), (0.27, 0.26), (-0.01, -0.02)),
    "duquant_gptq": ((14.2, 14.4), (0.39, 0.4), (-0.04, -0.05)),
}
ERROR = 0.005  # of a difference


@pytest.fixture
def quality(tmp_path, save):
    """Three methods of two seeds."""
    for method, scores in SCORES.items():
        for seed, (ppl, kl, difference) in enumerate(zip(*scores, strict=True)):
            config = composed_once("+experiment=toy", f"+method={method}", f"seed={seed}")
            metrics = {
                **{"ppl/wiki/fp": 9.75, "ppl/wiki/fake": ppl, "kl/wiki/fake": kl},
                "zeroshot_mean/difference/fake": difference,
                "zeroshot_mean/difference_stderr/fake": ERROR,
            }
            save(f"quality/{method}_seed{seed}.json", config, metrics, model={"heads": 9})
    (tmp_path / "quality" / "titles.yaml").write_text("quarot: QuaRot\nduquant_gptq: DuQuant\n")
    return tmp_path / "quality"


def rows(table: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line
    ]


def test_a_row_has_what_a_method_scores_and_what_its_networks_take(quality, time_network):
    files = [
        time_network("decode", None, {"b1": 2.96, "b16": 3.125}),
        time_network("prefill", None, {"b1": 1.9375}),
        time_network("decode", "learned_blocks", {"b1": 2.5, "b16": 2.75}),
    ]
    head, _, original, *found = rows(pareto_table(quality, "quarot", *map(str, files)))
    assert head == [
        *("method", "online", "wiki gap", "wiki KL", "difference", "decode, batch 1"),
        *("decode, batch 16", "prefill", "memory, batch 16"),
    ]
    assert original == ["original", "", "", "—", "—", *["1.00"] * 4]
    assert [row[0] for row in found] == ["quarot", "duquant_gptq", "learned_blocks"]
    online = {"quarot": "R3, R4", "duquant_gptq": "R3, dual transforms"}
    online["learned_blocks"] = "R3, R4, blocks"
    speeds = {
        "quarot": ["2.96", "3.12", "1.94", "0.32"],
        "duquant_gptq": [""] * 4,  # of which there is no record
        "learned_blocks": ["2.50", "2.75", "", "0.36"],  # whose prefill is not timed
    }
    against = np.log(SCORES["quarot"][0])
    for method, *cells in found:
        ppl, kl, difference = map(np.array, SCORES[method])
        share = ((against - np.log(ppl)) / (against - math.log(9.75))).mean()
        assert cells == [
            online[method],
            f"{100 * share:.0f} %" if method != "quarot" else "",
            f"{kl.mean():.3f} ± {kl.std(ddof=1):.3f}",
            f"{100 * difference.mean():.1f} ± {100 * ERROR:.1f}",
            *speeds[method],
        ]


def test_a_page_names_its_speeds_from_the_repository_wherever_it_is_made(
    quality, time_network, tmp_path, monkeypatch
):
    time_network("decode", None, {"b1": 2.96})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    speed = "bench/decode_llama2_7b_hadamards_h200.json"
    page = f"<!-- table: pareto quality quarot {speed} -->\n<!-- end -->"
    table = pareto_table(quality, "quarot", str(tmp_path / speed))
    assert rebuilt(page, tmp_path) == page.replace("-->\n", f"-->\n{table}\n", 1)
    missing = page.replace("decode", "prefill")
    with pytest.raises(InputError, match=r"speeds=bench/prefill_llama2_7b_.* is no record"):
        rebuilt(missing, tmp_path)
