"""Codecs of the cache in a table and a file: the numbers of their records, the most bits first."""

import json

import numpy as np
import pytest

from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.report.tables import FILES, KINDS, SHEETS
from spinlab.report.tables.kv import kv_sheet, kv_summary
from tests.report.conftest import composed_once

TEXTS = ("wiki", "c4")
KINDS_OF_TEXTS = {"ppl": 9.0, "kl": 0.2, "flips": 0.1, "diverges": 40.0, "attention_output": 0.01}
# words of a run, its seeds, bits per number, share of the cache that is coded
CODECS = {
    "kv16": (["kv=kv16"], 1, 16.0, 0.0),
    "qjl": (["kv=qjl", "rotation=none"], 3, 3.5, 0.9),
    "kv4": (["kv=kv4"], 1, 4.375, 1.0),
    "lloyd_max3": (["kv=lloyd_max3"], 1, 3.25, 1.0),
}


def metrics_of(name: str, seed: int, factor: float = 1.0) -> dict[str, float]:
    """Return what a run measures, numbers that are each codec's and seed's own."""
    bits, coded = CODECS[name][2:]
    drawn = np.random.default_rng([len(name), seed])
    found = {f"{kind}/{text}/fake": factor * value * drawn.uniform(1, 2)
             for kind, value in KINDS_OF_TEXTS.items() for text in TEXTS}  # fmt: skip
    share = drawn.integers(5, 15) / 20
    return {
        **found,
        **{f"attention_kl/{text}/fake": 7.0 for text in TEXTS},  # which is not shown
        **{"ppl/wiki/fp": 8.0, "ppl/c4/fp": 16.0, "needle/1024/fp": 0.9 - 0.1 * seed},
        **{"needle_stderr/1024/fp": 0.06 + 0.01 * seed, "needle/1024/fake": share},
        "needle_stderr/1024/fake": (share * (1 - share) / 20) ** 0.5,
        **{"bits/kv/fake": bits, "coded/kv/fake": coded},
        "bytes/kv/4096/fake": round(bits * 2**19 * factor),
        "bytes/kv/32768/fake": round(bits * 2**22 * factor),
    }


@pytest.fixture
def records(tmp_path, save):
    """Codecs of two models, the second with twice the numbers of the first and one codec alone."""
    for name, (words, seeds, *_) in CODECS.items():
        for seed in range(seeds):
            config = composed_once("+experiment=kv", "model=toy", *words, f"seed={seed}")
            save(f"kv/small/{name}_seed{seed}.json", config, metrics_of(name, seed))
    config = composed("+experiment=kv", "model=random", "kv=kv4")
    save("kv/large/kv4_seed0.json", config, metrics_of("kv4", 0, 2.0))
    return tmp_path / "kv"


def told(values: np.ndarray, digits: int) -> str:
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def test_a_row_has_means_and_deviations_of_a_codec_and_rows_come_by_their_bits(records):
    head, original, *rows = kv_sheet(records / "small").rows
    of_row = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(of_row) == ["kv16", "kv4", "qjl", "lloyd_max3"]
    columns = {"ppl": ("ppl", 1, 2), "kl": ("KL", 1, 3), "flips": ("flips", 100, 1)}
    columns |= {"diverges": ("diverges", 1, 1), "attention_output": ("output error", 1, 4)}
    assert len(head) == 10 + len(TEXTS) * len(columns) + 1
    for name, row in of_row.items():
        _, seeds, bits, coded = CODECS[name]
        runs = [metrics_of(name, seed) for seed in range(seeds)]
        for kind, (title, scale, digits) in columns.items():
            for text in TEXTS:
                values = scale * np.array([run[f"{kind}/{text}/fake"] for run in runs])
                assert row[f"{text} {title}"] == told(values, digits)
        shares = np.array([run["needle/1024/fake"] for run in runs])
        error = np.sqrt((shares * (1 - shares) / 20).sum()) / seeds
        assert row["needle 1024"] == f"{100 * shares.mean():.1f} ± {100 * error:.1f}"
        assert (row["seeds"], row["bits"]) == (str(seeds), f"{bits:.2f}")
        assert row["MiB, 4096 tokens"] == f"{bits / 2:.1f}"
        assert row["MiB, 32768 tokens"] == f"{bits * 4:.1f}"
        assert row["coded"] == ("" if name == "kv16" else f"{100 * coded:.1f}")
    original = dict(zip(head, original, strict=True))
    # of three seeds: codecs with the same one asked the same original for the same needles
    error = np.sqrt(0.06**2 + 0.07**2 + 0.08**2) / 3
    assert original["wiki ppl"] == "8.00"
    assert original["needle 1024"] == f"80.0 ± {100 * error:.1f}"
    assert original["c4 KL"] == "—"


def test_settings_of_keys_values_and_heads_are_those_of_the_record(records):
    head, _, *rows = kv_sheet(records / "small").rows
    names = ("keys", "values", "in 16 bits", "rotation")
    found = {row[0]: [row[head.index(name)] for name in names] for row in rows}
    levels = "Lloyd-Max, 3 bits, norm corrected"
    assert found == {
        "kv16": ["16 bits", "16 bits", "", "R2, R3"],
        "kv4": ["4 bits", "4 bits", "", "R2, R3"],
        "qjl": ["QJL, 2 signs, 8 outlier channels in 2", "2 bits", "96 newest", "none"],
        "lloyd_max3": [levels, levels, "", "R2, R3"],
    }


def test_what_is_coded_is_a_column_where_something_is_not(records):
    (records / "small" / "qjl_seed0.json").rename(records / "qjl.json")
    for seed in (1, 2):
        (records / "small" / f"qjl_seed{seed}.json").unlink()
    assert "coded" not in kv_sheet(records / "small").rows[0]  # 16 bits code nothing anyway


def test_the_summary_has_every_model_and_the_sizes_of_the_one_that_is_named(records):
    (records / "note.txt").write_text("no model")
    path = kv_summary(records, "kv.json", "small")
    assert path == records.parent / "kv.json"
    summary = json.loads(path.read_text())
    assert summary["model"] == "small"
    expected: dict[str, float] = {}
    for name, (_, seeds, bits, _) in CODECS.items():
        for text in TEXTS:
            values = [metrics_of(name, seed)[f"kl/{text}/fake"] for seed in range(seeds)]
            expected[f"kl/small/{name}/{text}"] = float(np.mean(values))
        expected |= {f"bits/{name}": bits, f"bytes/{name}/4096": bits * 2**19}
        expected[f"bytes/{name}/32768"] = bits * 2**22
    for text in TEXTS:
        expected[f"kl/large/kv4/{text}"] = metrics_of("kv4", 0, 2.0)[f"kl/{text}/fake"]
    assert summary["metrics"] == pytest.approx(expected)
    with pytest.raises(InputError, match=r"has no records of 'smal': did you mean small"):
        kv_summary(records, "kv.json", "smal")


def test_a_record_without_a_coded_cache_is_told(tmp_path, save):
    config = composed("+experiment=kv", "model=toy")
    save("kv/kv4_seed0.json", config, {"ppl/wiki/fp": 8.0})
    with pytest.raises(InputError, match=r"a record of kv/toy/kv4 has no bits/kv/fake"):
        kv_sheet(tmp_path / "kv")
    save("kv/kv4_seed0.json", config, metrics_of("kv4", 0), schema=2)
    with pytest.raises(InputError, match=r"a record of kv/toy/kv4 has schema 2"):
        kv_sheet(tmp_path / "kv")


def test_the_kinds_are_known_to_pages_and_to_the_command():
    assert {"kv", "formats"} <= KINDS.keys() & SHEETS.keys()
    assert "kv" in FILES
