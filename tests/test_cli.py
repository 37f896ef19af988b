"""What a user sees: help at once, and one sentence with exit status 2 for every mistake."""

import os
import signal
import subprocess
import sys
import time
import weakref
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from spinlab.__main__ import main
from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.report import __main__ as report
from spinlab.streams import Terminated

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


@pytest.fixture
def shown(monkeypatch, capsys):
    """Run the command line in this process to show settings; return them."""

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["spinlab", *arguments, "--cfg", "job"])
        GlobalHydra.instance().clear()
        main()
        return yaml.safe_load(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=str)
def test_every_experiment_composes(path, shown):
    name = shown(f"+experiment={path.stem}")["name"]
    assert name == path.stem or name.startswith(("${model.name}/", f"{path.stem}/${{"))


@pytest.mark.parametrize("name", ["toy", "smollm2_135m_w4a4kv4", "llama2_7b_w4a4kv4"])
def test_a_chosen_group_beats_the_experiments_own(name, shown):
    chosen = ["learn=none", "quant=w4a4_quarot", "eval=ppl"]
    composed = shown(f"+experiment={name}", *chosen)
    assert composed["learn"]["steps"] == 0
    assert composed["learn"]["lr"]["clip"] == 0
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
        ([*TOY, "quant=mxfp5"], ["unknown quant 'mxfp5'", "mxfp4"]),
        (
            [*TOY, "quant=mxfp6_e3m2"],
            ["mxfp6_e3m2 is no preset", "quant.weights.format=mxfp6_e3m2", "beside quant=mxfp6"],
        ),
        ([*TOY, "quant.weights.bits=1"], ["quant.weights.bits=1", "2 to 16"]),
        ([*TOY, "quant.activations.bits=17"], ["quant.activations.bits=17", "2 to 16"]),
        ([*TOY, "kv.keys.bits=0"], ["kv.keys.bits=0", "1 to 16"]),
        ([*TOY, "kv.values.bits=12"], ["kv.values.bits=12", "2 to 8 bits"]),
        ([*TOY, "kv.k_bits=3"], ["unknown setting 'kv.k_bits'", "mean kv.key", "kv.keys.bits"]),
        ([*TOY, "kv.v_clip_ratio=0.9"], ["'kv.v_clip_ratio'", "mean kv.values.clip_ratio"]),
        ([*TOY, "kv.keys.codec=afine"], ["kv.keys.codec=afine", "affine"]),
        ([*TOY, "quant.weights.bits=12"], ["quant.weights.bits=12", "integer kernels"]),
        ([*TOY, "rotation.r1=hadamart"], ["rotation.r1=hadamart", "hadamard"]),
        ([*TOY, "quant.weights.group_size=7"], ["group_size=7 does not divide 96"]),
        ([*TOY, "quant.activations.group_size=7"], ["group_size=7 does not divide"]),
        ([*TOY, "kv.keys.group_size=7"], ["kv.keys.group_size=7 does not divide 16"]),
        ([*TOY, "learn.batch=3", "learn.micro_batch=2"], ["learn.micro_batch=2", "learn.batch=3"]),
        ([*TOY, "eval.variants=[fp,int5]"], ["eval.variants=int5", "integer"]),
        ([*TOY, "data.calibration=wikki"], ["'wikki'", "wiki, c4"]),
        ([*TOY, "data.calibration=/no/such.txt"], ["/no/such.txt does not exist"]),
        ([*TOY, "model.weights=pretrained", "model.path=/no/model"], ["/no/model", "config.json"]),
        ([*TOY, "model=random", "model.weights=pretrained"], ["no model is named", "model.path"]),
        ([*TOY, "quant.weights.group_size=12"], ["group_size=12", "do not nest"]),
        ([*TOY, "eval.max_windows=0"], ["eval.max_windows=0 must be positive"]),
        (
            [*TOY, "learn.optimizer.max_grad_norm=-1"],
            ["learn.optimizer.max_grad_norm=-1", "positive"],
        ),
        ([*TOY, "eval.limit=1"], ["eval.limit=1", "at least 2"]),
        (["+experiment=toy", "tracker=none", "eval.tasks=[pika]"], ["pika", "piqa"]),
        ([*TOY, "weights=gptq", "learn.lr.clip=0.1"], ["learn.lr.clip=0.1", "weights=rtn"]),
        ([*TOY, "rotation.load=/missing/R.bin"], ["rotation.load=/missing/R.bin", "not exist"]),
        ([*TOY, "rotation.load=R.pt"], ["must end in .safetensors or .bin"]),
        (["+experiment=toy", "method=quarot"], ["+method=NAME"]),
        (["+experiment=paper", "+method=quarot"], ["method=NAME, without a plus"]),
        (["+experiment=toy", "sweep=seeds"], ["+sweep=NAME"]),
        (["+experiment=toy", "+sweep=sedes"], ["unknown sweep 'sedes'", "did you mean seeds"]),
        (["+experiment=toy", "+sweep=search"], ["pip install hydra-optuna-sweeper"]),
        ([*TOY, "sweep.metric=ppl/wiki/fp"], ["sweep.metric is not read with one run alone"]),
        ([*TOY, "rotation.load=R.bin", "rotation.online=false"], ["brings its rotations"]),
        ([*TOY, "rotation=duquant", "rotation.online=false"], ["runs online"]),
        ([*TOY, "rotation.r4=random", "rotation.r4_block=64"], ["rotation.r4=random"]),
        ([*TOY, "weights=lwc", "learn.lr.clip=0.1"], ["learn.lr.clip=0.1", "weights=rtn"]),
        (
            [*TOY, "rotation=smoothquant", "rotation.smooth_groups=[o]", "rotation.online=false"],
            ["grouped queries", "rotation.smooth_groups"],
        ),
        ([*TOY, 'quant.overrides=[{pattern:"*"}]'], ["overrides[*]", "must have weights or"]),
        ([*TOY, 'quant.overrides=[{pattern:"*",weights:8}]'], [":8}]: 8 is no set of settings"]),
        ([*TOY, 'quant.overrides=[{pattern:"*",weights:{bits:4.5}}]'], ["bits:4.5", "to Integer"]),
        ([*TOY, "quant.overrides=[{weights:{bits:8}}]"], ["quant.overrides[0].pattern is missing"]),
        ([*TOY, "rotation.smooth=0.5"], ["rotation.smooth", "rotation.r1=none"]),
        ([*TOY, "rotation.r4_block=128"], ["rotation.r4_block=128 does not divide 192"]),
        ([*TOY, 'quant.overrides=[{pattern:"*.up",weights:{bits:8}}]'], ["'*.up' matches no"]),
        (
            [*TOY, 'quant.overrides=[{pattern:"*.down_proj",weights:{bit:8}}]'],
            ["weights:{bit:8}", "bit is unknown: did you mean bits?"],
        ),
        (
            [*TOY, 'kv.overrides=[{pattern:"*",keys:{codec:lloyd_max,lloyd_max:{lenght:norm}}}]'],
            ["lloyd_max:{lenght:norm}", "lenght is unknown: did you mean length?"],
        ),
        (
            [*TOY, 'quant.overrides=[{pattern:"*.up_proj",activations:{bits:8}}]'],
            ["shares its input", "quant.overrides"],
        ),
        ([*TOY, "runtime.device=tpu"], ["runtime.device=tpu", "cuda"]),
        (["+experiments=toy"], ["unknown setting 'experiments'", "+experiment"]),
        ([*TOY, "+foo=1"], ["unknown setting 'foo'"]),
        ([*TOY, "+learn.stpes=3"], ["unknown setting 'learn.stpes'", "learn.steps"]),
        ([*TOY, "++quant.weights.bit=3"], ["'quant.weights.bit'", "quant.weights.bits"]),
        (["--experiment", "toy"], ["write +experiment=NAME"]),
        (["experiment", "toy"], ["write +experiment=NAME"]),
        ([*TOY, "model=null"], ["model=null", "toy"]),
        ([*TOY, "model=", "learn.steps=1"], ["conf/model"]),
        ([*TOY, "model={nmae:x}"], ["unknown setting 'model.nmae'", "model.name"]),
        (
            [*TOY, "model=random", "model.architecture.foo=1"],
            ["write +model.architecture.foo=VALUE"],
        ),
        ([*TOY, "+learn=none"], ["learn is chosen already", "learn=NAME"]),
        ([*TOY, "+experiment=toy"], ["+experiment=NAME, once"]),
        ([*TOY, "model.path=/a,b"], ["several values", "'model.path=\"/a,b\"'"]),
        ([*TOY, "seed=1,2"], ["seed=[1,2]", "-m"]),
        ([*TOY, "eval.variants=fp"], ["is no list: write eval.variants=[fp]"]),
        ([*TOY, "learn.steps=null"], ["learn.steps needs a value"]),
        ([*TOY, "learn.steps.x=3"], ["learn.steps is one value"]),
        ([*TOY, "~learn.steps"], ["cannot be deleted"]),
        ([*TOY, "name=../x"], ["name='../x'", "no .."]),
        (["-m", *TOY, "hydra/launcher=submitit_slurm"], ["pip install hydra-submitit-launcher"]),
        (["-m", *TOY, "hydra/launcher=joblib"], ["pip install hydra-joblib-launcher"]),
        (["-m", *TOY, "hydra/sweeper=optuna"], ["pip install hydra-optuna-sweeper"]),
        (["-m", *TOY, "hydra/launcher=basci"], ["unknown hydra/launcher 'basci'", "basic"]),
        ([*TOY, "hydra.run.dir=/proc/x"], ["/proc/x"]),
        (["--resolve"], ["--cfg"]),
        (["--config-name", "nope"], ["'nope'"]),
        ([*TOY, "learn=none", "learn.lr.r1=3"], ["learn.lr.r1 is not read with learn.steps=0"]),
        ([*TOY, "learn.lr=0.5"], ["learn.lr has settings of its own: learn.lr.r1, learn.lr.r2"]),
        ([*TOY, "learn.optimizer=qr_sgd"], ["of its own: learn.optimizer.name, "]),
        ([*TOY, "learn.momentum=0.5"], ["did you mean learn.optimizer.momentum"]),
        ([*TOY, "learn.lr.r1=inf"], ["learn.lr.r1=inf is no finite number"]),
        ([*TOY, "eval.window=600"], ["eval.window=600 is longer than the 512 tokens"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_status_2(mistake, arguments, words):
    sentence = mistake(*arguments)
    for word in words:
        assert word in sentence


def test_learning_that_diverges_is_one_sentence_and_status_2(mistake, short_text):
    far = ["learn.lr.r1=1e30", "learn.optimizer.cap_step=false"]
    sentence = mistake(*TOY, *short_text, *far, "learn.optimizer.max_grad_norm=null")
    assert "diverged at step" in sentence and "learn.lr.r1" in sentence


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

    monkeypatch.setattr("spinlab.assets.distribution", missing)
    assert "make setup" in mistake(*TOY)


@pytest.fixture
def sweep(monkeypatch, capsys, tmp_path):
    """Run a sweep whose jobs only fail or not; return its exit status, its jobs and stderr."""

    def run(failing: dict[int, Exception], *arguments: str) -> tuple[int, list[int], list[str]]:
        seeds = []

        def experiment(composed, words):
            seeds.append(composed.seed)
            if composed.seed in failing:
                raise failing[composed.seed]
            return "done", str(tmp_path / "record.json"), {}

        monkeypatch.setattr("spinlab.__main__._finished_or_run", experiment)
        words = ["-m", *TOY, f"paths.runs={tmp_path}", *arguments]
        monkeypatch.setattr(sys, "argv", ["spinlab", *words])
        GlobalHydra.instance().clear()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.splitlines()
        return status, seeds, [line for line in lines if line.startswith("spinlab: ")]

    return run


def test_every_failure_of_a_sweep_is_told_and_summed_up(sweep):
    failing = {1: InputError("no such text"), 3: InputError("too short")}
    status, seeds, lines = sweep(failing, "seed=0,1,2,3")
    assert (status, seeds) == (2, [0, 1, 2, 3])
    assert lines == [
        "spinlab: seed=1: no such text",
        "spinlab: seed=3: too short",
        "spinlab: 2 of 4 failed: seed=1: no such text; seed=3: too short",
    ]


def test_a_sweep_of_which_nothing_is_known_is_no_success(sweep, monkeypatch):
    monkeypatch.setattr("spinlab.sweep.Point.save", lambda point, place: None)
    status, _, lines = sweep({}, "seed=0,1")
    assert status == 1
    assert "the states of all points are gone: run it again" in lines[0]


def test_a_failed_job_of_a_sweep_keeps_nothing_alive(monkeypatch, tmp_path):
    """Its frames hold networks, and the next job needs their room."""

    class Network:
        pass

    networks, alive = weakref.WeakSet(), []

    def experiment(composed, words):
        alive.append(len(networks))
        network = Network()
        networks.add(network)
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise InputError("a smaller batch") from error

    monkeypatch.setattr("spinlab.__main__._finished_or_run", experiment)
    monkeypatch.setattr(
        sys, "argv", ["spinlab", "-m", *TOY, f"paths.runs={tmp_path}", "seed=0,1,2"]
    )
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        main()
    assert alive == [0, 0, 0]


def test_a_fault_in_a_sweep_is_status_1_with_its_trace(sweep):
    failing = {0: InputError("no such text"), 1: RuntimeError("out of luck")}
    status, seeds, lines = sweep(failing, "seed=0,1,2", "hydra.sweeper.max_batch_size=1")
    assert (status, seeds) == (1, [0, 1, 2])
    assert lines[1] == "spinlab: seed=1: RuntimeError: out of luck"
    assert lines[2].startswith("spinlab: 2 of 3 failed: seed=0: no such text; seed=1: RuntimeError")
    assert sweep({}, "seed=0,1")[::2] == (0, [])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("too short"), 2, "too short"),
        (RuntimeError("out of luck"), 1, "RuntimeError: out of luck"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command to go on"),
        (Terminated(signal.SIGTERM), 143, "interrupted: run the same command to go on"),
        (Terminated(signal.SIGHUP), 129, "interrupted: run the same command to go on"),
    ],
    ids=["mistake", "fault", "ctrl-c", "sigterm", "sighup"],
)
def test_an_end_has_one_line_and_its_own_status(monkeypatch, capsys, error, status, said):
    def experiment(composed, words):
        raise error

    monkeypatch.setattr("spinlab.__main__._experiment", experiment)
    monkeypatch.setattr(sys, "argv", ["spinlab", *TOY])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == status
    *trace, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spinlab: {said}")
    assert ("Traceback" in "".join(trace)) == (status == 1)
    assert not trace or status == 1


def test_a_sweep_writes_nothing_outside_its_folder(sweep, tmp_path):
    sweep({}, "seed=0,1", "name=../../x")
    assert not (tmp_path.parent.parent / "x").exists()


NO_FOLDERS = [
    "", "..", "a/..", "../x", "/x", "a//b", "a/", ".", "~x", "a/~b", "a\\b", "a\nb", "a" * 201,
]  # fmt: skip


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(InputError, match="is no name for a folder"):
        Config(name=name)
    for good in ("llama2_7b/spinquant_had", "über mich", "a..b", "v1.0", ".hidden"):
        assert Config(name=good).name == good


def test_the_version_is_spinlabs_own():
    done = command_line("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("spinlab ")
    assert "Hydra" not in done.stdout


def test_the_console_script_completes_names(tmp_path):
    script = tmp_path / "spinlab"
    script.write_text(f"#!{sys.executable}\nfrom spinlab.__main__ import main\nmain()\n")
    script.chmod(0o755)
    shell = (
        'eval "$(spinlab -sc install=bash)"; COMP_LINE="spinlab +experiment=toy learn.st"; '
        "COMP_WORDS=($COMP_LINE); COMP_CWORD=2; hydra_bash_completion; echo ${COMPREPLY[@]}"
    )
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", shell], env=os.environ | paths, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "learn.steps=", done.stderr


def test_a_report_says_what_it_does_before_it_writes(capsys, monkeypatch):
    monkeypatch.setattr(report, "pages", lambda root: pytest.fail("it writes"))
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    assert "Rebuild every table" in capsys.readouterr().out
