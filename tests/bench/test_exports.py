"""Exports are read back and measured, and packed networks loaded in a process of their own."""

import json
from pathlib import Path

import pytest
import torch

from spinlab.bench.__main__ import main
from spinlab.bench.artefact import bench_artefact
from spinlab.bench.exports import bench_exports
from spinlab.compose import composed
from spinlab.errors import InputError


def test_a_loaded_artefact_is_weighed_against_its_file():
    metrics = bench_artefact("toy", None, torch.device("cpu"))["metrics"]
    linears = 2 * (4 * 48 * 48 - 2 * 48 * 24 + 3 * 48 * 96)
    assert (
        metrics["bytes/artefact"] > linears / 2 + 2 * 4 * 128 * 48
    )  # nibbles; both ends in floats
    assert metrics["speed/artefact/load/seconds"] > 0
    host = metrics["bytes/artefact/load/host"]
    assert host >= metrics["bytes/artefact/loaded/host"] >= 0
    if host:
        assert metrics["ratio/artefact/load/host"] == host / metrics["bytes/artefact"]
    assert "bytes/artefact/load/device" not in metrics


def toy(folder: Path, *more: str) -> list[str]:
    places = [f"paths.cache={folder}/cache", f"paths.runs={folder}/runs"]
    quick = ["learn=none", "eval.variants=[fp,fake]", "eval.tasks=[]", "eval.max_windows=1"]
    return ["+experiment=toy", "tracker=none", *places, *quick, *more]


def test_an_export_is_what_the_record_is_about(tmp_path):
    words = toy(tmp_path, f"export.artefact={tmp_path}/a", f"--out={tmp_path}/x.json")
    main(["exports", *words])
    record = json.loads((tmp_path / "x.json").read_text())
    assert "paths" not in record["config"] and str(tmp_path) not in json.dumps(record)
    metrics = record["metrics"]
    assert metrics["same_bits/artefact/spinlab"] == 1
    assert metrics["logits_error/artefact/spinlab"] == 0
    for text in ("wiki", "c4"):
        found = metrics[f"ppl/{text}/artefact/spinlab"]
        assert found == metrics[f"ppl/{text}/artefact/network"] > 1
    size = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors"))
    assert metrics["bytes/artefact"] == size
    assert metrics["ratio/bytes/artefact"] == size / metrics["bytes/original"]


def test_there_must_be_an_export_to_read(tmp_path):
    words = toy(tmp_path, f"export.rotations={tmp_path}/r.safetensors")
    with pytest.raises(InputError, match="name at least one export that is a model"):
        bench_exports(composed(*words), words)
