"""What a user sees: help at once, and one sentence with exit status 2 for every mistake."""

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from spinlab.__main__ import main

ROOT = Path(__file__).parent.parent
TOY = ["+experiment=toy", "tracker=none", "eval.tasks=[]"]


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spinlab", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def mistake(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; return the one sentence it fails with."""

    def run(*arguments: str) -> str:
        paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", ["spinlab", *arguments, *paths])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "spinlab:" in line]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job", "+experiment=toy"]])
def test_help_and_settings_come_without_importing_torch(arguments):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['spinlab', *{arguments!r}]\n"
        "try: runpy.run_module('spinlab', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learn" in done.stdout
    assert time.perf_counter() - start < 10  # 0.4 s on an idle machine


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=str)
def test_every_experiment_composes_under_its_own_name(path):
    done = command_line(f"+experiment={path.stem}", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["name"] == path.stem


@pytest.mark.parametrize("name", ["toy", "smollm2_135m_w4a4kv4", "llama2_7b_w4a4kv4"])
def test_a_chosen_group_beats_the_experiments_own(name):
    chosen = ["learn=none", "quant=w4a4_quarot", "eval=ppl"]
    done = command_line(f"+experiment={name}", *chosen, "--cfg", "job")
    composed = yaml.safe_load(done.stdout)
    assert composed["learn"]["steps"] == 0
    assert composed["learn"]["lr_clip"] == 0
    assert composed["quant"]["activations"]["clip_ratio"] == 0.9
    assert (composed["eval"]["window"], composed["eval"]["tasks"]) == (2048, [])


def test_it_runs_from_any_folder(tmp_path):
    command = [sys.executable, "-m", "spinlab", "--cfg", "job", "+experiment=toy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+experiment=toi"], ["unknown experiment 'toi'", "did you mean toy?"]),
        (["experiment=toy"], ["+experiment=NAME"]),
        ([*TOY, "learn.stesp=3"], ["unknown setting 'learn.stesp'", "learn.steps"]),
        ([*TOY, "learn.steps=many"], ["learn.steps=many", "Integer"]),
        ([*TOY, "model=smolm2_135m"], ["unknown model", "smollm2_135m"]),
        ([*TOY, "quant.weights.bits=1"], ["quant.weights.bits=1", "2 to 16"]),
        ([*TOY, "quant.activations.bits=17"], ["quant.activations.bits=17", "2 to 16"]),
        ([*TOY, "kv.k_bits=0"], ["kv.k_bits=0", "2 to 16"]),
        ([*TOY, "quant.weights.bits=12"], ["quant.weights.bits=12", "integer kernels"]),
        ([*TOY, "rotation.r1=hadamart"], ["rotation.r1=hadamart", "hadamard"]),
        ([*TOY, "quant.weights.group_size=7"], ["group_size=7 does not divide 96"]),
        ([*TOY, "quant.activations.group_size=7"], ["group_size=7 does not divide"]),
        ([*TOY, "kv.group_size=7"], ["kv.group_size=7 does not divide 16"]),
        ([*TOY, "learn.batch=3", "learn.micro_batch=2"], ["learn.micro_batch=2", "learn.batch=3"]),
        ([*TOY, "eval.variants=[fp,int5]"], ["eval.variants=int5", "int4"]),
        ([*TOY, "data.calibration=wikki"], ["'wikki'", "wiki, c4"]),
        ([*TOY, "data.calibration=/no/such.txt"], ["/no/such.txt does not exist"]),
        ([*TOY, "model.weights=pretrained", "model.path=/no/model"], ["/no/model", "config.json"]),
        ([*TOY, "model.weights=pretrained"], ["no model is named", "model.path"]),
        ([*TOY, "quant.weights.group_size=12"], ["group_size=12", "do not nest"]),
        ([*TOY, "eval.max_windows=0"], ["eval.max_windows=0 must be positive"]),
        ([*TOY, "learn.max_grad_norm=-1"], ["learn.max_grad_norm=-1", "positive"]),
        ([*TOY, "eval.limit=1"], ["eval.limit=1", "at least 2"]),
        (["+experiment=toy", "tracker=none", "eval.tasks=[pika]"], ["pika", "piqa"]),
        ([*TOY, "weights=gptq", "learn.lr_clip=0.1"], ["learn.lr_clip=0.1", "weights=rtn"]),
        (
            [*TOY, "learn.lr=1e30", "learn.cap_step=false", "learn.max_grad_norm=null"],
            ["diverged at step", "learn.lr"],
        ),
        ([*TOY, "rotation.load=/missing/R.bin"], ["rotation.load=/missing/R.bin", "not exist"]),
        ([*TOY, "rotation.load=R.pt"], ["must end in .safetensors or .bin"]),
        (["+experiment=toy", "method=quarot"], ["+method=NAME"]),
        (["+experiment=methods_smollm2/rtn", "+method=quarot"], ["method=NAME, without a plus"]),
        ([*TOY, "rotation.load=R.bin", "rotation.online=false"], ["brings its rotations"]),
        ([*TOY, "rotation=duquant", "rotation.online=false"], ["runs online"]),
        ([*TOY, "rotation.r4=random", "rotation.r4_block=64"], ["rotation.r4=random"]),
        ([*TOY, "weights=lwc", "learn.lr_clip=0.1"], ["lwc_epochs", "set one to 0"]),
        (
            [*TOY, "rotation=smoothquant", "rotation.smooth_groups=[o]", "rotation.online=false"],
            ["grouped queries", "rotation.smooth_groups"],
        ),
        ([*TOY, 'quant.overrides=[{pattern:"*"}]'], ["must have a pattern, and weights"]),
        ([*TOY, 'quant.overrides=[{pattern:"*",weights:8}]'], ["weights=8 must be a set"]),
        ([*TOY, 'quant.overrides=[{pattern:"*",weights:{bits:4.5}}]'], ["bits=4.5", "bits (int)"]),
        ([*TOY, "rotation.smooth=0.5"], ["rotation.smooth", "rotation.r1=none"]),
        ([*TOY, "rotation.r4_block=128"], ["rotation.r4_block=128 does not divide 192"]),
        ([*TOY, 'quant.overrides=[{pattern:"*.up",weights:{bits:8}}]'], ["'*.up' matches no"]),
        (
            [*TOY, 'quant.overrides=[{pattern:"*.down_proj",weights:{bit:8}}]'],
            ["bit=8 does not fit", "clip_ratio"],
        ),
        (
            [*TOY, 'quant.overrides=[{pattern:"*.up_proj",activations:{bits:8}}]'],
            ["shares its input", "quant.overrides"],
        ),
        ([*TOY, "runtime.device=tpu"], ["runtime.device=tpu", "cuda"]),
        ([*TOY, "learn=none", "learn.lr=3"], ["learn.lr is not read with learn.steps=0"]),
        ([*TOY, "learn.lr=inf"], ["learn.lr=inf is no finite number"]),
        ([*TOY, "eval.window=600"], ["eval.window=600 is longer than the 512 tokens"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_status_2(mistake, arguments, words):
    sentence = mistake(*arguments)
    for word in words:
        assert word in sentence


def test_a_text_shorter_than_a_window(mistake, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A short text. " * 5)
    sentence = mistake(*TOY, f"data.evaluation=[{text}]")
    assert "fewer than one window of 128" in sentence
    assert "fewer than one window" in mistake(
        *TOY, f"data.calibration={text}", "learn.sequence_length=512"
    )


def test_an_unsupported_family(mistake, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    sentence = mistake(*TOY, "model.weights=pretrained", f"model.path={tmp_path}")
    assert "'gpt2'" in sentence
    assert "llama" in sentence


def test_missing_package_data(mistake, monkeypatch):
    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("spinlab.data.assets.distribution", missing)
    assert "make setup" in mistake(*TOY)
