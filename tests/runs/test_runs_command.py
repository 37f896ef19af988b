"""Runs on the disk: what is listed, shown and compared, and what is cleared away or kept."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spinlab.runs.__main__ import main
from spinlab.runs.found import Run
from spinlab.runs.listing import Filter

ROOT = Path(__file__).parent.parent.parent


def settings(seed: int, rate: float) -> dict:
    learn = {"lr": {"r1": rate, "r2": None}}
    return {"seed": seed, "learn": learn, "eval": {"variants": ["fp", "fake"]}}


def record(key: str, **changes) -> dict:
    made = {
        "schema": 3,
        "experiment": "toy",
        "key": key * 16,
        "identity": {"calibration": "b"},
        "config": {
            "seed": 0,
            "learn": {"lr": {"r1": 0.5, "r2": None}},
            "eval": {"variants": ["fp", "fake"]},
        },
        "overrides": ["+experiment=toy", "seed=0"],
        "environment": {"git": {"commit": "c"}},
        "stages": [{"name": "learn", "key": key * 16, "cached": False, "seconds": 2.0}],
        "metrics": {"ppl/wiki/fp": 5.0, "ppl/wiki/fake": 8.0},
        "status": "complete",
    }
    return made | changes


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Write records and stages below a folder, and return a call of the command line."""
    monkeypatch.chdir(tmp_path)

    def write(*records: dict) -> None:
        for age, content in enumerate(records):
            folder = tmp_path / "runs" / content["experiment"] / content["key"]
            folder.mkdir(parents=True)
            path = folder / "record.json"
            path.write_text(json.dumps(content))
            os.utime(path, (1000 + age, 1000 + age))
            for stage in content["stages"]:
                made = tmp_path / ".cache" / "spinlab" / f"{stage['name']}-{stage['key']}"
                made.mkdir(parents=True, exist_ok=True)
                (made / "tensors").write_bytes(b"x" * 2**20)

    return write


THREE = (
    record("a"),
    record(
        "b",
        config=settings(1, 1.5),
        overrides=["+experiment=toy", "seed=1", "+method=quarot"],
        metrics={"ppl/wiki/fp": 5.0, "ppl/wiki/fake": 6.0},
    ),
    record("c", status="failed: ValueError: no", metrics={}),
)


def listed(capsys, *words: str) -> list[str]:
    main(words)
    return [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]


def test_the_list_has_all_runs_with_what_their_commands_differ_in(places, capsys):
    places(*THREE)
    main([])
    assert capsys.readouterr().out.splitlines() == [
        "| key      | experiment | state    | seed | method | ppl/wiki/fake |",
        "|----------|------------|----------|------|--------|---------------|",
        "| aaaaaaaa | toy        | complete | 0    |        | 8             |",
        "| bbbbbbbb | toy        | complete | 1    | quarot | 6             |",
        "| cccccccc | toy        | failed   | 0    |        |               |",
    ]


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["seed=0"], "ac"),
        (["seed=0,1", "state=complete"], "ab"),
        (["seed=1.0"], "b"),
        (["ppl/wiki/fake=..7"], "b"),
        (["ppl/wiki/fake=6.5.."], "a"),
        (["learn.lr.r1=0.1..1"], "ac"),
        (["eval.variants=[fp,fake]"], "abc"),
        (["method=qua*"], "b"),
        (["key=a*"], "a"),
        (["seed=many"], ""),
        (["--sort", "ppl/wiki/fake"], "bac"),
        (["--sort", "ppl/wiki/fake", "--reverse"], "abc"),
        (["--reverse"], "cba"),
        (["list", "seed=1", "--columns", "learn.lr.r1"], "b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_runs_are_found_by_settings_and_metrics(places, capsys, words, keys):
    places(*THREE)
    assert listed(capsys, *words) == [key * 8 for key in keys]


def test_numbers_are_compared_as_numbers_and_words_as_patterns(tmp_path):
    run = Run(tmp_path, record("a", metrics={"m/x": 1e-3}))
    assert all(
        Filter("m/x", wanted).fits(run) for wanted in ("0.001", "1e-3", "..1", "-1..", "5,..1")
    )
    assert not any(Filter("m/x", wanted).fits(run) for wanted in ("0.*", "x..y", "true", "2.."))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sede=0"], "no run has 'sede', a setting or a metric: did you mean seed?"),
        (["--sort", "ppl/wiki/fkae"], "did you mean ppl/wiki/fake"),
        (
            ["--columns", "learn.rl.r1"],
            "no run has 'learn.rl.r1', a setting or a metric: did you mean learn.lr.r1",
        ),
        (["seed"], "'seed' is no condition: write NAME=VALUE"),
        (["seed="], "is no condition"),
        (["seed=7,"], "'seed=7,' is no condition"),
        (["show", "d"], "no run has a key that starts with 'd'"),
        (["show", ""], "3 runs have keys that start with ''"),
        (["clean", "all"], "clean all: clean runs, stages, or both"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_sentence_and_status_2(places, capsys, words, said):
    places(*THREE)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_what_is_no_record_is_named_and_left_out(places, capsys, tmp_path):
    places(THREE[0])
    for name, content in (("torn", "{"), ("list", "[]"), ("other", '{"schema": 1, "metrics": {}}')):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "record.json").write_text(content)
    main([])
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3
    lines = told.err.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"runs/{n}/record.json" for n in ("list", "other", "torn")
    ]
    assert "no record of a run" in lines[1]


def test_metrics_of_older_records_have_the_names_of_today(places, capsys):
    places(record("a", schema=2, metrics={"ppl/wiki/int4": 5.0}), record("b"))
    assert listed(capsys, "ppl/wiki/integer=5") == ["a" * 8]


def test_a_run_is_shown_with_settings_stages_and_metrics(places, capsys):
    places(*THREE)
    main(["show", "bb"])
    out = capsys.readouterr().out
    assert "spinlab +experiment=toy seed=1 +method=quarot" in out
    assert "| seed          | 1         |" in out
    assert "eval.variants" in out
    assert "| ppl/wiki/fake | 6     |" in out
    assert "| learn | bbbbbbbbbbbbbbbb |" in out


def test_what_a_run_was_given_by_a_path_is_told_in_its_command_and_in_the_list(places, capsys):
    loaded = settings(0, 0.5) | {"rotation": {"load": "R.safetensors"}}
    folder = {"source": {"folder": "mine"}}
    places(record("a"), record("b", config=loaded, model=folder))
    main(["show", "bb"])
    command = capsys.readouterr().out.splitlines()[1]
    assert command.endswith("model.path=FOLDER_OF_THE_MODEL rotation.load=R.safetensors")
    main([])
    assert "| state    | model.path" in (out := capsys.readouterr().out)
    assert "| R.safetensors |" in out


def test_what_has_no_column_is_named_below_the_list(places, capsys):
    words = [f"weights.gptq.{name}={n}" for n, name in enumerate("abcdefgh")]
    places(record("a"), record("b", overrides=["+experiment=toy", *words]))
    main([])
    told = capsys.readouterr().out.splitlines()[-1]
    assert (
        told
        == "They differ in weights.gptq.f, weights.gptq.g, weights.gptq.h too: --columns shows it."
    )


def test_two_runs_are_compared_in_settings_circumstances_and_metrics(places, capsys):
    places(
        THREE[0],
        record(
            "b",
            environment={"git": {"commit": "d"}},
            metrics={"ppl/wiki/fp": 5.0, "ppl/wiki/fake": 6.0, "x": 1},
        ),
    )
    main(["compare", "a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert "| environment.git.commit | c        | d        |" in lines
    assert not any("seed" in line for line in lines)
    assert "| ppl/wiki/fake | 8        | 6        | -2    | -25.00 |" in lines
    assert any(line.startswith("| x ") for line in lines)
    assert "1 of 3 metrics are the same." in lines


def clean(*words: str) -> None:
    main(["clean", *words])


def test_cleaning_says_what_it_frees_and_keeps_it_unless_that_is_agreed_to(
    places, capsys, monkeypatch, tmp_path
):
    places(*THREE)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit):
        clean()
    told = capsys.readouterr()
    assert "runs/toy/cccccccccccccccc" in told.out
    assert "1 runs and 1 stages, 1.0 MiB" in told.out
    assert "nothing was removed: agree, or add --yes" in told.err
    assert (tmp_path / "runs/toy" / ("c" * 16)).exists()


def test_what_did_not_end_well_goes_with_its_stages_and_the_rest_stays(places, capsys, tmp_path):
    places(*THREE, record("d", status="interrupted"), record("e", status="running"))
    cache = tmp_path / ".cache" / "spinlab"
    (cache / f"learn-{'f' * 16}.partial" / "progress").mkdir(parents=True)
    (cache / f"learn-{'f' * 16}.lock").write_text("")
    (cache / "somebody's").mkdir()
    clean("--yes")
    left = {path.name for path in (tmp_path / "runs/toy").iterdir()}
    assert left == {"a" * 16, "b" * 16}
    stages = {path.name for path in cache.iterdir()} - {"in-use.lock"}
    assert stages == {f"learn-{'a' * 16}", f"learn-{'b' * 16}", "somebody's"}
    capsys.readouterr()
    clean("--yes")
    assert capsys.readouterr().out == "there is nothing to clean\n"


def test_only_one_kind_is_cleaned_where_only_that_is_asked_for(places, tmp_path):
    places(*THREE)
    clean("stages", "--yes")  # the failed run names its own
    assert len(list((tmp_path / ".cache/spinlab").glob("learn-*"))) == 3
    clean("runs", "--yes")
    assert len(list((tmp_path / "runs/toy").iterdir())) == 2
    assert len(list((tmp_path / ".cache/spinlab").glob("learn-*"))) == 3


def stages_left(cache: Path) -> set[str]:
    return {path.name[-1] for path in cache.glob("learn-*")}


def test_no_stage_goes_unless_all_records_that_name_some_are_read(places, capsys, tmp_path):
    places(*THREE)
    cache, broken = tmp_path / ".cache/spinlab", tmp_path / "runs/toy/x/record.json"
    (tmp_path / "empty").mkdir()
    broken.parent.mkdir()
    broken.write_text(json.dumps(record("a", schema=99)))
    refused = {
        ("--runs", "rnus"): "rnus is no folder",
        ("--runs", "empty"): "empty holds no record, and all stages would go",
        ("stages",): "runs/toy/x/record.json may name stages, and is not read",
    }
    for words, said in refused.items():
        with pytest.raises(SystemExit) as stop:
            clean("--yes", *words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert stages_left(cache) == {"a", "b", "c"}
    clean("--yes", "runs")
    assert stages_left(cache) == {"a", "b", "c"}
    assert not (tmp_path / "runs/toy" / ("c" * 16)).exists()


def test_a_repetition_that_did_not_end_keeps_its_stages(places, capsys, tmp_path):
    places(record("a"), record("b"))
    again = tmp_path / "runs/toy" / ("a" * 16) / "unfinished.json"
    stages = [{"name": "learn", "key": "b" * 16}]
    again.write_text(json.dumps(record("a", status="interrupted", stages=stages)))
    shutil.rmtree(tmp_path / "runs/toy" / ("b" * 16))
    clean("--yes")
    assert stages_left(tmp_path / ".cache/spinlab") == {"a", "b"}
    again.write_text("{")
    with pytest.raises(SystemExit):
        clean("--yes")
    assert "unfinished.json may name stages, and is not read" in capsys.readouterr().err
    assert stages_left(tmp_path / ".cache/spinlab") == {"a", "b"}


def test_stages_stay_whose_run_stays_or_ended_meanwhile(places, capsys, monkeypatch, tmp_path):
    places(*(record(key, status="interrupted") for key in "abc"))
    cache, folder = tmp_path / ".cache/spinlab", tmp_path / "runs/toy"
    shutil.rmtree(folder / ("b" * 16))

    def agreed() -> bool:
        """Start the first run again and let the second one end, while the user thinks."""
        (folder / ("a" * 16) / "record.json").write_text(json.dumps(record("a")))
        places(record("b"))
        return True

    monkeypatch.setattr("spinlab.runs.__main__._agreed", agreed)
    with pytest.raises(SystemExit):
        clean()
    said = capsys.readouterr().err
    assert "aaaa: in use by now" in said and "learn-bbbbbbbbbbbbbbbb: named by a record" in said
    assert stages_left(cache) == {path.name[0] for path in folder.iterdir()} == {"a", "b"}


def split(line: str) -> list[str]:
    return line.split("|")


def test_a_stage_says_whether_its_run_goes_too(places, capsys, tmp_path):
    places(*THREE)
    (tmp_path / ".cache/spinlab" / f"learn-{'d' * 16}").mkdir()
    clean("--yes")
    lines = [line for line in capsys.readouterr().out.splitlines() if "learn-" in line]
    reasons = {folder.strip()[-1]: why.strip() for _, folder, why, *_ in map(split, lines)}
    assert reasons == {"c": "of a run that goes", "d": "of no record"}


def test_what_the_system_keeps_is_named_and_the_rest_goes(places, capsys, tmp_path, monkeypatch):
    places(record("a"), *(record(key, status="interrupted") for key in "bcd"))
    cache = tmp_path / ".cache/spinlab"
    (cache / f"learn-{'e' * 16}").symlink_to(tmp_path)  # a link's folder is not ours
    kept, gone = (tmp_path / "runs/toy" / (key * 16) for key in "bc")
    remove = shutil.rmtree

    def refusing(path: Path) -> None:
        if path.name in (kept.name, f"learn-{'d' * 16}"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        remove(path)
        if path.name == gone.name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(shutil, "rmtree", refusing)
    with pytest.raises(SystemExit) as stop:
        clean("--yes")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"not removed: runs/toy/{'b' * 16}: Permission denied; " in line
    assert line.endswith(f"learn-{'d' * 16}: Permission denied")
    assert {path.name[0] for path in kept.parent.iterdir()} == {"a", "b"}
    assert stages_left(cache) == {"a", "b", "d", "e"}  # b: of the run that stays


HOLDER = """
import sys, time
from pathlib import Path
from spinlab.held import Hold

hold = Hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"held\n"
    return process


def test_what_a_running_process_holds_stays_until_it_is_killed(places, capsys, tmp_path):
    places(record("a", status="running", stages=[]), record("b"))
    stray = tmp_path / ".cache/spinlab" / f"learn-{'f' * 16}"
    stray.mkdir()
    folder = tmp_path / "runs/toy" / ("a" * 16)
    processes = [holder(folder), holder(stray.parent)]
    try:
        main(["state=running"])
        assert "aaaaaaaa" in capsys.readouterr().out
        clean("--yes")
        told = capsys.readouterr().out.splitlines()
        assert told[0] == ".cache/spinlab is in use, and its stages are not looked at"
        assert told[1:] == ["there is nothing else to clean"]
        assert folder.exists() and stray.exists()
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
    main(["state=killed"])
    assert "aaaaaaaa" in capsys.readouterr().out
    clean("--yes")
    assert not folder.exists() and not stray.exists()


LIST = """
import sys
from spinlab.runs.__main__ import main

main([])
print({"torch", "hydra", "numpy", "omegaconf", "transformers", "yaml"} & set(sys.modules))
"""


def test_listing_loads_no_library_that_takes_longer_than_itself(places):
    places(*THREE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", LIST]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "aaaaaaaa" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", ["spinlab.runs --help", "spinlab.report --help"])
def test_a_reader_that_leaves_early_is_no_failure(command):
    """As `| head` does: what is left unread is not told of."""
    line = f"set -o pipefail; {sys.executable} -m {command} | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
