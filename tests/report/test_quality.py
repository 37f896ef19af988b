"""The summary of all models and methods, against means of the records by hand."""

import json
import math
from pathlib import Path

import pytest

from spinlab.report.averaged import read_seeds
from spinlab.report.tables.quality import quality_summary

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"


def save(folder: Path, method: str, seed: int, **metrics: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    whole = {"schema": 3, "experiment": method, "status": "complete", "config": {"seed": seed}}
    (folder / f"{method}_seed{seed}.json").write_text(json.dumps({**whole, "metrics": named}))


def test_numbers_are_means_over_seeds_by_model_and_method(tmp_path):
    for model, factor in (("a", 1.0), ("b", 2.0)):
        place = tmp_path / "quality" / model
        for seed, (quarot, ours) in enumerate([(20.0, math.sqrt(200)), (40.0, 20.0)]):
            fp = {"ppl__wiki__fp": 10.0, "zeroshot_mean__accuracy__fp": 0.4}
            answers = {"zeroshot_mean__accuracy__fake": 0.3 + seed / 10}
            save(place, "quarot", seed, ppl__wiki__fake=quarot, kl__wiki__fake=factor, **fp)
            found = {"ppl__wiki__fake": ours, "kl__wiki__fake": factor * seed}
            save(place, "ours", seed, **found, **answers, **fp)
    (tmp_path / "quality" / "titles.txt").write_text("no model")
    path = quality_summary(tmp_path / "quality", "quality.json", "quarot")
    assert path == tmp_path / "quality.json"
    summary = json.loads(path.read_text())
    assert summary["baseline"] == "quarot"
    for model, factor in (("a", 1.0), ("b", 2.0)):
        of_model = {k: v for k, v in summary["metrics"].items() if k.split("/")[1] == model}
        assert of_model == {
            f"gap_closed/{model}/ours/wiki": pytest.approx(0.5),
            f"gap_closed/{model}/ours/wiki/deviation": pytest.approx(0.0, abs=1e-12),
            f"kl/{model}/ours/wiki": pytest.approx(factor / 2),
            f"kl/{model}/quarot/wiki": pytest.approx(factor),
            f"zeroshot/{model}/ours/mean": pytest.approx(0.35),
            f"zeroshot/{model}/original/mean": pytest.approx(0.4),
        }


def test_a_model_without_the_baseline_has_no_share_of_a_gap(tmp_path):
    fp = {"ppl__wiki__fp": 10.0, "zeroshot_mean__accuracy__fp": 0.4}
    save(tmp_path / "quality" / "a", "ours", 0, ppl__wiki__fake=20.0, kl__wiki__fake=1.0, **fp)
    summary = quality_summary(tmp_path / "quality", "quality.json", "quarot")
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics == {"kl/a/ours/wiki": 1.0, "zeroshot/a/original/mean": 0.4}


def test_the_committed_summary_has_every_method_of_every_model():
    metrics = json.loads((EXPERIMENTS / "quality.json").read_text())["metrics"]
    for place in (EXPERIMENTS / "quality").iterdir():
        records = read_seeds(place)
        for method, runs in records.items():
            kl = [run["metrics"]["kl/wiki/fake"] for run in runs]
            assert metrics[f"kl/{place.name}/{method}/wiki"] == pytest.approx(sum(kl) / len(kl))
            assert (f"gap_closed/{place.name}/{method}/c4" in metrics) == (
                "quarot" in records and method != "quarot"
            )
        assert 0.3 < metrics[f"zeroshot/{place.name}/original/mean"] < 1
