"""Two processes against one: the same numbers, one record, one sentence.

Run as a script, by torchrun, this file takes the measurements that its tests compare with those
of the one process that runs the tests. Most of the time goes into imports, so it takes all at once.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import spinlab
from spinlab import parallel
from spinlab.__main__ import main
from spinlab.cache import Cache
from spinlab.config import (
    GPTAQConfig,
    GPTQConfig,
    ModelConfig,
    QuantConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.device import choose_device
from spinlab.errors import InputError
from spinlab.fakequant.insert import insert_fake_quant
from spinlab.metrics.divergence import Divergence
from spinlab.metrics.perplexity import perplexity
from spinlab.metrics.states import States
from spinlab.model.load import load_model
from spinlab.model.modules import linear_at
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.base import Rounding
from spinlab.weights.calibration import LayerInputs
from spinlab.weights.layerwise import gather, quantize_gptaq, quantize_gptq

ROOT = Path(__file__).parent.parent
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
COUNTS = (1, 2, 5)  # of windows: too few for both, as many as processes, not to be halved
GPTQ = WeightsConfig(method="gptq", gptq=GPTQConfig(block_size=10))
GPTAQ = WeightsConfig(method="gptaq", gptaq=GPTAQConfig(block_size=10))
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
# random weights: one level that flips takes a trained network's learning elsewhere, in float32
TOY = ["+experiment=toy", "model=random", "learn.steps=6", "tracker=none", "eval.tasks=[]"]
FEW = ["eval.variants=[fp,fake]", "eval.max_windows=3", "weights=gptq", "weights.gptq.samples=5"]

FAILS = """
import sys
from pathlib import Path
from spinlab import parallel
from spinlab.cache import Cache

def work(folder):
    if not parallel.is_main():
        raise OSError("the second process is out of luck")
    parallel.barrier()

parallel.start("cpu")
Cache(Path(sys.argv[1]) / "cache").run("s", 1, work, together=True)
"""


# what is measured, by every process ---------------------------------------------------------


def measure(out: Path) -> None:
    """Write this process's numbers to rank-N.json and rank-N.safetensors, and run an experiment."""
    parallel.start("cpu")
    numbers = {"perplexity": perplexities(), **parts(), **exchanged(), **stages(out)}
    numbers["divergence"] = divergences(out / "states")
    weights = quantized(out) | paired(out / "gptaq")
    (out / f"rank-{parallel.rank()}.json").write_text(json.dumps(numbers))
    save_file(hessians() | weights, out / f"rank-{parallel.rank()}.safetensors")
    sys.argv = ["spinlab", *toy(out)]
    main()


def toy(out: Path) -> list[str]:
    """Return the words of an experiment on a text of 10 000 letters."""
    text = out / "text.txt"
    if parallel.is_main():
        text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(10_000)))
    parallel.barrier()
    texts = [f"data.calibration={text}", f"data.evaluation=[{text}]"]
    paths = [f"paths.cache={out / 'toy'}", f"paths.runs={out / 'runs'}"]
    export = f"export.artefact={out / 'artefact'}"
    return [*TOY, *FEW, *texts, "weights.gptq.sequence_length=64", export, *paths]


def network(dtype: str) -> PreTrainedModel:
    return load_model(network_config(dtype), None, 0)


def network_config(dtype: str) -> ModelConfig:
    return ModelConfig(architecture=ARCHITECTURE, dtype=dtype)


def windows(count: int) -> torch.Tensor:
    return torch.randint(0, 64, (count, 24), generator=torch.Generator().manual_seed(3))


def perplexities() -> list[float]:
    model = network("float64")
    return [perplexity(model, windows(n), batch, "test") for batch in (1, 2) for n in COUNTS]


def divergences(folder: Path) -> list[dict[str, float]]:
    """Return how far a network of random weights is from another one, over all tokens."""
    original, other = (load_model(network_config("float32"), None, seed) for seed in (0, 1))
    found = []
    for count in COUNTS:
        states, label = States(folder), f"of {count}"
        with states.keeping(original, label) as keep:
            perplexity(original, windows(count), 2, label, keep)
        parallel.barrier()
        divergence = Divergence(states, label, windows(count), torch.device("cpu"))
        perplexity(other, windows(count), 2, label, divergence.see)
        found.append(divergence.metrics())
    return found


def parts() -> dict:
    return {"parts": [parallel.part(torch.arange(n)).tolist() for n in (0, *COUNTS)]}


def exchanged() -> dict:
    """Tell what this process has after every exchange of values and tensors."""
    rank = parallel.rank()
    tensors = [
        torch.full((2, 3), rank, dtype=torch.int16),
        torch.full((3, 2), 0.1 + rank, dtype=torch.bfloat16).mT,
        torch.tensor(1.5 + rank, dtype=torch.float64),
        torch.full((0, 3), rank),
    ]
    parallel.share_tensors(tensors)
    with parallel.alone():
        by_itself = [parallel.world(), float(parallel.sum_(torch.ones(())))]
    return {
        "rank": rank,
        "world": parallel.world(),
        "shared": parallel.share({"rank": rank}),
        "summed": parallel.sum_(torch.tensor([1, rank])).tolist(),
        "tensors": [tensor.tolist() for tensor in tensors],
        "alone": by_itself,
    }


def stages(out: Path) -> dict:
    """Tell who worked on a stage of each kind, and what all hold of them afterwards."""
    told, worked = Cache(out / "cache"), []

    def work(folder: Path) -> None:
        worked.append([folder.name, parallel.world()])
        if parallel.is_main():
            (folder / "result.txt").write_text("42")

    later = Cache(out / "cache")  # of another run: what a run asks for again it tells once
    found = [told.run("single", 1, work), told.run("shared", 1, work, together=True)]
    found.append(later.run("shared", 1, work, together=True))
    results = [(folder / "result.txt").read_text() for folder, _ in found]
    cached = [report["cached"] for report in (*told.as_json(), *later.as_json())]
    return {"worked": worked, "keys": [k for _, k in found], "results": results, "cached": cached}


def hessians() -> dict[str, torch.Tensor]:
    """Return the Hessian of every layer's first linear, from parts that differ in size."""
    model = network("float32")
    insert_fake_quant(model, RotationSet(), None)
    inputs = LayerInputs(model, parallel.part(windows(5)), 2)
    found = {}
    for layer in range(2):
        linear = linear_at(model, f"model.layers.{layer}.self_attn.q_proj")
        found[f"hessian.{layer}"] = gather(inputs, linear)
        inputs.advance()
    return found


def quantized(out: Path) -> dict[str, torch.Tensor]:
    """Quantize by GPTQ, then once more after the first layer; return levels and perplexities."""
    found = {}
    for run in ("whole", "resumed"):
        model = network("float32")
        weights = quantize_gptq(Rounding(model, RotationSet(), windows(5), QUANT, GPTQ, out))
        found |= {f"{run}.{name}": weight.levels for name, weight in weights.items()}
        with parallel.alone():
            value = perplexity(model, windows(8), 1, run)
        found[f"perplexity.{run}"] = torch.tensor(value, dtype=torch.float64)
        parallel.barrier()
        if parallel.is_main():
            (out / "layer-001.safetensors").unlink()
        parallel.barrier()
    return found


def paired(out: Path) -> dict[str, torch.Tensor]:
    """Quantize by GPTAQ, whose H and D come of all windows; return levels."""
    out.mkdir(exist_ok=True)
    rounding = Rounding(network("float32"), RotationSet(), windows(5), QUANT, GPTAQ, out)
    return {f"gptaq.{name}": weight.levels for name, weight in quantize_gptaq(rounding).items()}


# the tests ----------------------------------------------------------------------------------


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    """Run a script or module in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return run([*command, *arguments])


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, str]:
    """Where two processes left what they measured, and what they printed."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun(__file__, str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(job) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    """What each of the processes measured."""
    numbers = [json.loads((job[0] / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return numbers, [load_file(job[0] / f"rank-{rank}.safetensors") for rank in range(2)]


def test_perplexity_is_that_of_one_process_for_any_number_of_windows(two):
    """A batch's loss is a mean in float32: with two windows in one it tells who sits together."""
    expected = perplexities()
    for found in (numbers["perplexity"] for numbers in two[0]):
        assert found[:3] == pytest.approx(expected[:3], rel=1e-9)
        assert found[3:] == pytest.approx(expected[3:], rel=1e-6)


def test_divergence_is_that_of_all_tokens_of_all_processes(two, tmp_path):
    expected = divergences(tmp_path)
    for found in (numbers["divergence"] for numbers in two[0]):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
            assert 0 < ours["flips"] <= 1


def test_parts_are_contiguous_and_cover_the_rows(two):
    first, second = (numbers["parts"] for numbers in two[0])
    assert first == [[], [0], [0], [0, 1, 2]]
    assert second == [[], [], [1], [3, 4]]
    assert parts()["parts"] == [list(range(n)) for n in (0, *COUNTS)]


def test_values_and_tensors_of_any_dtype_come_from_the_first_process(two):
    for rank, numbers in enumerate(two[0]):
        assert (numbers["rank"], numbers["world"]) == (rank, 2)
        assert numbers["shared"] == {"rank": 0}
        assert numbers["summed"] == [2, 1]
        assert numbers["tensors"] == exchanged()["tensors"]
        assert numbers["alone"] == [1, 1.0]


def test_what_was_begun_is_waited_for_in_its_order_and_before_more_begins():
    told: list[str] = []

    def begun() -> Iterator[tuple[int, list[Any]]]:
        for name in range(3):
            told.append(f"began {name}")
            yield name, [SimpleNamespace(wait=partial(told.append, f"waited {name}"))]

    assert list(parallel.in_turn(begun(), 2)) == [0, 1, 2]
    assert told == ["began 0", "began 1", "waited 0", "began 2", "waited 1", "waited 2"]


def test_a_stage_is_done_by_the_first_process_or_by_all(two):
    first, second = two[0]
    single, shared, _ = first["keys"]
    assert first["worked"] == [[f"single-{single}.partial", 1], [f"shared-{shared}.partial", 2]]
    assert second["worked"] == [[f"shared-{shared}.partial", 2]]
    for numbers in two[0]:
        assert numbers["keys"] == first["keys"]
        assert numbers["results"] == ["42"] * 3
        assert numbers["cached"] == [False, False, True]


def test_hessians_are_summed_over_all_windows(two):
    for name, expected in hessians().items():
        for tensors in two[1]:
            torch.testing.assert_close(tensors[name], expected, rtol=1e-6, atol=1e-6)


def test_gptq_ends_with_the_same_bits_everywhere_and_resumes_with_them(two):
    first, second = two[1]
    for name, tensor in first.items():
        if name.startswith(("whole", "resumed")):
            assert torch.equal(tensor, second[name])
            assert torch.equal(tensor, first["whole" + name.removeprefix(name.split(".")[0])])


def test_gptq_is_as_good_as_in_one_process(two, tmp_path):
    """Sums in another order flip a level here and there, and each flip moves those after it."""
    expected = quantized(tmp_path)
    found = two[1][0]
    name = "perplexity.whole"
    assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-3)
    for name, levels in expected.items():
        if name.startswith("whole"):
            assert (found[name] != levels).float().mean() < 0.02


def test_gptaq_ends_with_the_same_bits_everywhere_and_is_as_good_as_in_one_process(two, tmp_path):
    """Sums in another order flip a level here and there."""
    first, second = two[1]
    for name, levels in paired(tmp_path).items():
        assert torch.equal(first[name], second[name])
        assert (first[name] != levels).float().mean() < 0.02
        by_gptq = first[name.replace("gptaq", "whole")]
        assert name.endswith("embed_tokens") or (first[name] != by_gptq).any(), name


def test_more_processes_than_windows_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    one = Rounding(network("float32"), RotationSet(), windows(1), QUANT, GPTQ, tmp_path)
    with pytest.raises(InputError, match=r"weights\.gptq\.samples=1 leaves some of 2 processes"):
        quantize_gptq(one)


def test_a_failure_in_another_process_ends_the_job(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = torchrun(str(script), str(tmp_path))
    assert done.returncode != 0
    assert "OSError: the second process is out of luck" in done.stderr
    assert not list(tmp_path.glob("cache/s-*/manifest.json"))


def test_a_stage_within_a_stage_is_refused(tmp_path):
    told = Cache(tmp_path)

    def work(folder: Path) -> None:
        told.run("inner", 1, lambda folder: None)

    with pytest.raises(AssertionError, match="inner must be asked for before outer starts"):
        told.run("outer", 1, work)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", "cuda:1"),
        ("cuda", "cuda:1"),
        ("cpu", "cpu"),
        ("cuda:0", "one device for all processes: use cuda"),
    ],
)
def test_every_process_has_its_own_device(monkeypatch, name, expected):
    set_by_torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    set_by_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, value in set_by_torchrun.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if ":" in name:
        with pytest.raises(InputError, match=expected):
            choose_device(name)
        return
    assert str(choose_device(name)) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if name != "cpu":
        with pytest.raises(InputError, match=r"2 processes need as many .* this machine has 1"):
            choose_device(name)


def record_in(out: Path) -> tuple[Path, dict]:
    """Return the only record below a folder."""
    (path,) = (out / "runs").rglob("record.json")
    return path.parent, json.loads(path.read_text())


def test_two_processes_leave_one_record_like_that_of_one(job, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["spinlab", *toy(tmp_path)])
    GlobalHydra.instance().clear()
    main()
    (_, one), (folder, two), output = record_in(tmp_path), record_in(job[0]), job[1]
    assert two["status"] == "complete"
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert [s["key"] for s in two["stages"]] == [s["key"] for s in one["stages"]]
    assert two["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        # learning and GPTQ add up in another order, which flips 4-bit levels
        exact = name.startswith(("bytes", "bits")) or name.endswith("/fp")
        noise = {"rel": 1e-6} if exact else {"rel": 2e-3, "abs": 2e-3}
        assert two["metrics"][name] == pytest.approx(value, **noise), name
    assert not list(job[0].glob("toy/*.partial"))
    assert spinlab.load(job[0] / "artefact", device="cpu").config.model_type == "llama"
    assert output.count("| fp ") == output.count("record: ") == 1
    assert output.count("learn        done") == 1
    assert len(re.findall("learning (hardly moved|made)", output)) <= 2  # one warning for each text
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "spinlab", *TOY, "learn.stesp=3"], "unknown setting 'learn.stesp'"),
        (["-m", "spinlab", "-m", "seed=0,1", *TOY], "torchrun runs one experiment"),
        (
            ["-m", "spinlab", *TOY, "data.evaluation=[conf/runtime/auto.yaml]"],
            "fewer than one window",
        ),
    ],
    ids=["at once", "sweep", "in a stage of the first process"],
)
def test_a_mistake_is_one_sentence_and_a_failed_job(tmp_path, short_text, arguments, words):
    paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    done = torchrun(*arguments, short_text[0], *paths)
    assert done.returncode != 0
    (sentence,) = (line for line in done.stderr.splitlines() if "spinlab: " in line)
    assert words in sentence
    assert "RuntimeError" not in done.stderr  # of those who waited


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
