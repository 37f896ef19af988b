"""What must not enter a record: integers that are not their numbers, and numbers that are none."""

import json
import logging
import shutil
import subprocess
import sys
import weakref

import pytest
import torch

import spinlab.experiment as experiment
import spinlab.memory.check as check
import spinlab.runtime.stock.insert as network
from spinlab.compose import composed
from spinlab.errors import InputError, ResultError
from spinlab.metrics.perplexity import perplexity
from spinlab.metrics.predictions import read_predictions
from spinlab.rotation.check import GATE_TOKENS
from spinlab.stages.handoff import BrokenHandoff
from spinlab.stages.original import Original
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.text import windows_in
from spinlab.track.record import Record
from spinlab.track.trackers import Trackers

QUANTIZED = ("rtn", "init", "fake", "integer")
FAST = ["learn=none", "eval.max_windows=1", "eval.tasks=[]", "tracker=none"]
FAST += ["model=random", "weights.clip.search=false", "model.architecture.num_hidden_layers=1"]
# a row of the embedding is not one of the head, which is read at every token
FAST += ["model.architecture.tie_word_embeddings=false"]


def settings(folder, *overrides):
    paths = [f"paths.cache={folder / 'cache'}", f"paths.runs={folder / 'runs'}"]
    return composed("+experiment=toy", *FAST, *paths, *overrides)


def pipeline(folder, *overrides) -> Pipeline:
    return Pipeline(settings(folder, *overrides))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A cache with the texts, which take the longest."""
    folder = tmp_path_factory.mktemp("texts")
    run = pipeline(folder)
    assert run.calibration and run.evaluation
    return folder / "cache"


@pytest.fixture
def folder(tmp_path, texts):
    shutil.copytree(texts, tmp_path / "cache")
    return tmp_path


def saturating(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply as processors do whose pairs of products meet in too few bits."""
    products = levels.int()[:, None] * weight.int()
    return products.unflatten(-1, (-1, 2)).sum(-1).clamp(-90, 90).sum(-1).int()


@pytest.mark.parametrize("variant", QUANTIZED)
def test_integers_of_every_variant_are_the_numbers_they_stand_for(folder, variant):
    assert pipeline(folder).handoff_error(variant) < 1e-12


@pytest.mark.parametrize("variant", QUANTIZED)
def test_wrong_integers_of_any_variant_are_refused_and_not_cached(folder, variant, monkeypatch):
    monkeypatch.setattr(network, "kernel_for", lambda backend, grid, device: saturating)
    with pytest.raises(BrokenHandoff, match=rf"{variant}'s integers.*runtime.backend=torch"):
        pipeline(folder).handoff_error(variant)
    assert not list((folder / "cache").glob("handoff-*/manifest.json"))


def test_no_network_of_the_handoff_stands_beside_another(folder):
    run, made = pipeline(folder), []
    run.initial, run.weights("integer")
    load = run.original.load

    def recorded(*args):
        assert not [ref for ref in made if ref() is not None]
        model = load(*args)
        made.append(weakref.ref(model))
        return model

    run.original.load = recorded
    assert run.handoff_error("integer") < 1e-12
    assert len(made) == 2


WITHOUT_ASSERTIONS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_measure as tests
from spinlab.errors import InputError, ResultError
from spinlab.rotation.rotations import RotationSet

assert False, "assertions are on"
try:
    RotationSet(r1=torch.ones(4, 4))
    print("taken")
except ResultError as error:
    print(error)
tests.network.kernel_for = lambda backend, grid, device: tests.saturating
try:
    tests.pipeline(Path({folder!r})).handoff_error("integer")
    print("passed")
except ResultError as error:
    print(error)
"""


def test_gates_hold_without_assertions(folder, request):
    script = WITHOUT_ASSERTIONS.format(tests=str(request.path.parent), folder=str(folder))
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("R1 is not orthogonal")
    assert second.startswith("integer's integers are not the numbers they stand for")
    assert not list((folder / "cache").glob("handoff-*/manifest.json"))


@pytest.fixture
def unseen_nan(monkeypatch):
    """Put a nan where the gates' tokens do not look: the embedding of a byte that is not there."""
    load, made = Original.load, Pipeline.__init__

    def known(self, *args):
        made(self, *args)
        self.original.pipeline = self

    def poisoned(self, *args):
        model, run = load(self, *args), self.pipeline
        seen = set(run.calibration.windows("gate", 1, GATE_TOKENS).flatten().tolist())
        read = windows_in(run.evaluation)["wiki"].flatten().tolist()
        token = next(t for t in read if t not in seen)
        model.get_input_embeddings().weight.data[token, 0] = torch.nan
        return model

    monkeypatch.setattr(Pipeline, "__init__", known)
    monkeypatch.setattr(Original, "load", poisoned)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # nan to a byte, in numpy
@pytest.mark.parametrize("variant", ["fp", "fake"])
def test_a_perplexity_that_is_no_number_is_refused_and_not_cached(folder, unseen_nan, variant):
    run = pipeline(folder, f"eval.variants=[{variant}]")
    assert run.calibration and run.evaluation
    if variant == "fake":
        assert run.handoff_error("fake") < 1e-12  # it does not see it
    with pytest.raises(ResultError, match=f"network {variant} is broken: ppl/wiki is nan"):
        run.measure(variant)
    assert not list((folder / "cache").glob("eval-*/manifest.json"))


def test_a_run_with_a_metric_that_is_no_number_fails(folder, unseen_nan):
    with pytest.raises(ResultError, match="ppl/wiki is nan"):
        experiment.run(settings(folder, "eval.variants=[fp]"), [])
    (path,) = (folder / "runs").glob("toy/*/record.json")
    record = json.loads(path.read_text())
    assert record["status"].startswith("failed: ResultError: the network fp is broken: ppl/wiki")
    assert "ppl/wiki/fp" not in record["metrics"]


def test_any_other_metric_that_is_no_number_fails_a_run(folder, monkeypatch):
    monkeypatch.setattr(Pipeline, "outliers", lambda run: {"before": torch.zeros(2, 96)})
    monkeypatch.setattr(experiment, "_figures", lambda *args: [])
    with pytest.raises(ResultError, match="outliers/before is nan"):
        experiment.run(settings(folder, "eval.variants=[fp]"), [])
    (path,) = (folder / "runs").glob("toy/*/record.json")
    assert json.loads(path.read_text())["status"].startswith("failed: ResultError")


def test_memory_that_runs_out_ends_a_run_with_a_sentence(folder, monkeypatch):
    monkeypatch.setattr(experiment, "_evaluations", lambda *parts: torch.empty(2**50))
    with pytest.raises(InputError, match="the host's memory ran out: what is finished is kept"):
        experiment.run(settings(folder, "eval.variants=[fp]"), [])
    (path,) = (folder / "runs").glob("toy/*/record.json")
    assert "allocate" in json.loads(path.read_text())["status"]


def test_memory_that_runs_out_before_the_first_stage_is_told_too(folder, monkeypatch):
    monkeypatch.setattr(experiment, "preflight", lambda *arguments: torch.empty(2**50))
    with pytest.raises(InputError, match="the host's memory ran out"):
        experiment.run(settings(folder), [])


def test_trackers_and_log_are_closed_where_the_record_cannot_be_saved(folder, monkeypatch):
    ended = []
    monkeypatch.setattr(experiment, "_save", lambda *arguments: 1 / 0)
    monkeypatch.setattr(Trackers, "finish", lambda self, outcome: ended.append(outcome.complete))
    before = list(logging.getLogger().handlers)
    with pytest.raises(ZeroDivisionError):
        experiment.run(settings(folder, "eval.variants=[fp]"), [])
    assert ended == [False]
    assert logging.getLogger().handlers == before


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(check, "left_on_host", lambda **_: 2**20)
    monkeypatch.setattr(Original, "load", None)
    with pytest.raises(InputError, match=r"needs at least .* GiB of memory"):
        experiment.run(settings(folder), [])


def test_a_run_that_is_cached_needs_no_memory(folder, monkeypatch):
    wanted = settings(folder, "eval.variants=[fp,integer]")
    experiment.run(wanted, [])
    monkeypatch.setattr(check, "left_on_host", lambda **_: 2**20)
    record = experiment.run(wanted, [])
    assert record.status == "complete"
    assert all(stage["cached"] for stage in record.stages)
    longer = settings(folder, "eval.variants=[fp,integer]", "eval.window=100")
    with pytest.raises(InputError, match=r"measuring .* needs at least"):
        experiment.run(longer, [])


def test_a_gate_is_recorded_for_every_network_on_integers(folder, monkeypatch):
    monkeypatch.setattr(Pipeline, "measure", lambda run, variant: {})
    monkeypatch.setattr(Pipeline, "handoff_error", lambda run, variant: float(len(variant)))
    run, config = pipeline(folder), settings(folder)
    record = Record(config, [], {}, {})
    experiment._evaluations(run, record, Trackers())
    names = ("invariance/rtn", "handoff/init", "invariance/fake", "invariance/integer")
    assert record.metrics == {name: float(len(name.rpartition("/")[2])) for name in names}


def test_perplexity_is_the_same_with_and_without_a_comparison(folder):
    apart = pipeline(folder, "eval.paired=false", "eval.variants=[fp,integer]")
    together = pipeline(folder, "eval.variants=[fp,integer]")
    assert apart.measure("fp") == together.measure("fp")
    alone, compared = apart.measure("integer"), together.measure("integer")
    assert alone.items() <= compared.items()
    more = {f"{name}/{text}" for name in ("kl", "kl_p99", "flips") for text in ("wiki", "c4")}
    assert compared.keys() - alone.keys() == {f"{name}/integer" for name in more}
    assert not list(apart.measured("fp").path.glob("states/*"))


def test_a_network_on_kernels_diverges_as_the_emulated_one(folder):
    run = pipeline(folder, "eval.variants=[fp,fake,integer]")
    found = run.measure("fake") | run.measure("integer")
    for name in ("kl/wiki", "kl_p99/wiki", "flips/wiki"):
        assert found[f"{name}/integer"] == pytest.approx(found[f"{name}/fake"], rel=1e-3)
        assert found[f"{name}/integer"] > 0


def test_the_original_by_itself_is_compared_with_nothing(folder):
    found = pipeline(folder, "eval.variants=[fp]").measure("fp")
    assert not [name for name in found if name.startswith(("kl", "flips", "paired"))]
    with pytest.raises(InputError, match=r"eval.paired is not read with eval.variants=\[fp\]"):
        experiment.run(
            settings(folder, "eval.variants=[fp]", "eval.paired=false"), ["eval.paired=false"]
        )


def test_answers_are_kept_beside_the_record_also_of_a_run_that_is_cached(folder):
    asked = ["eval.tasks=[piqa]", "eval.limit=3", "eval.variants=[fp,rtn,fake]"]
    asked += ["+eval.task_metrics.piqa=acc"]
    kept = []
    for runs in ("first", "second"):
        wanted = settings(folder, *asked, f"paths.runs={folder / runs}")
        record = experiment.run(wanted, [])
        kept.append({f.name: f.read_bytes() for f in record.folder.glob("predictions/*")})
        for variant in ("fp", "rtn"):
            answers = read_predictions(record.folder / "predictions" / f"{variant}.json.gz")
            right = sum(answer["acc"]["right"] for answer in answers["piqa"])
            assert record.metrics[f"zeroshot/piqa/acc/{variant}"] == pytest.approx(right / 3)
    assert kept[0].keys() == {"fp.json.gz", "rtn.json.gz"}  # fake is not among task_variants
    assert kept[0] == kept[1]
    metrics = record.metrics
    difference = metrics["zeroshot/piqa/acc/rtn"] - metrics["zeroshot/piqa/acc/fp"]
    assert metrics["paired/piqa/acc/difference/rtn"] == pytest.approx(difference)
    assert metrics["paired/piqa/n/rtn"] == 3
    assert metrics["zeroshot_mean/accuracy/rtn"] == metrics["zeroshot/piqa/acc/rtn"]
    assert metrics["zeroshot_mean/difference/rtn"] == metrics["paired/piqa/acc/difference/rtn"]
    assert not [name for name in metrics if "paired" in name and not name.endswith("/rtn")]


def test_a_loss_beyond_what_exp_can_hold_is_infinite(make_model, ids):
    model = make_model(torch.float32)
    model.lm_head.weight.data *= 1e5
    assert perplexity(model, ids, 1, "") == float("inf")
