"""Stages are computed once, survive kills, and notice damage."""

import errno
import json
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from spinlab.cache import PROGRESS, Cache
from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.tensors import kept_tensors, save_tensors

another_module_s_work = lambda folder: None  # noqa: E731
another_module_s_work.__module__ = "spinlab.errors"


def work_once(calls: list):
    def work(folder):
        calls.append(folder)
        (folder / "result.txt").write_text("42")

    return work


def test_the_same_inputs_are_computed_once(tmp_path):
    calls: list = []
    for _ in range(2):
        folder, key = Cache(tmp_path).run("s", {"a": 1}, work_once(calls))
        assert (folder / "result.txt").read_text() == "42"
        assert folder.name == f"s-{key}"
    assert len(calls) == 1


def test_other_inputs_names_and_code_have_other_keys(tmp_path):
    stages = Cache(tmp_path)
    keys = {
        stages.run("s", {"a": 1}, work_once([]))[1],
        stages.run("s", {"a": 2}, work_once([]))[1],
        stages.run("t", {"a": 1}, work_once([]))[1],
        stages.run("s", {"a": 1}, another_module_s_work)[1],
    }
    assert len(keys) == 4


def test_a_failed_stage_keeps_its_progress_and_is_not_finished(tmp_path):
    def fail(folder):
        (folder / PROGRESS / "half.txt").write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        Cache(tmp_path).run("s", 1, fail)

    def finish(folder):
        assert (folder / PROGRESS / "half.txt").read_text() == "half"
        (folder / "result.txt").write_text("whole")

    folder, _ = Cache(tmp_path).run("s", 1, finish)
    assert (folder / "result.txt").read_text() == "whole"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "result.txt").write_text("43"),
        lambda folder: (folder / "result.txt").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("null"),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    ],
    ids=["altered", "missing", "no manifest", "torn manifest", "null", "empty manifest"],
)
def test_a_damaged_entry_is_computed_again_with_a_warning(tmp_path, caplog, damage):
    calls: list = []
    folder, _ = Cache(tmp_path).run("s", 1, work_once(calls))
    damage(folder)
    with caplog.at_level(logging.WARNING):
        Cache(tmp_path).run("s", 1, work_once(calls))
    assert len(calls) == 2
    assert (folder / "result.txt").read_text() == "42"
    assert "is damaged" in caplog.text


def test_reports_tell_what_was_cached(tmp_path):
    Cache(tmp_path).run("s", 1, work_once([]))
    stages = Cache(tmp_path)
    stages.run("s", 1, work_once([]))
    stages.run("t", 1, work_once([]))
    assert [(r["name"], r["cached"]) for r in stages.as_json()] == [("s", True), ("t", False)]
    assert all(r["peak_memory_bytes"] > 0 for r in stages.as_json())


class Killed(BaseException):
    """Stand for SIGKILL: nothing that the process would do to files afterwards happens."""


def kill_at(monkeypatch, count: int) -> None:
    """Let so many operations on files happen in the cache, and then none."""
    done = 0

    def counted(operation):
        def call(*arguments, **options):
            nonlocal done
            done += 1
            if done > count:
                raise Killed
            return operation(*arguments, **options)

        return call

    for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def layered(done: list[int]):
    """Work in three steps, each on the one before, that are kept one by one."""

    def work(folder):
        total = torch.zeros(1)
        for step in range(3):
            path = folder / PROGRESS / f"{step}.safetensors"
            kept = kept_tensors(path)
            if kept is None:
                done.append(step)
                total = total * 10 + step + 1
                save_tensors(path, {"total": total})
            else:
                total = kept[0]["total"]
        write_json(folder / "result.json", total.tolist())
        (folder / "more").mkdir()
        (folder / "more" / "text.txt").write_text("and more")

    return work


def test_killed_anywhere_a_stage_goes_on_without_doing_a_finished_step_again(tmp_path, caplog):
    """After every possible number of operations on files; the last count is never reached."""
    for count in range(200):
        root, steps = tmp_path / str(count), []
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, count)
            try:
                Cache(root).run("s", 1, layered(steps))
                killed = False
            except Killed:
                killed = True
        folder, _ = Cache(root).run("s", 1, layered(steps))
        assert json.loads((folder / "result.json").read_text()) == [123]
        # a step whose file had its last name but was not reported is not done again either
        assert len(steps) <= 4
        assert sorted(set(steps)) == [0, 1, 2]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert set(manifest["files"]) == {"result.json", "more/text.txt"}
        left = {str(path.relative_to(root)) for path in root.rglob("*") if path.suffix != ".lock"}
        made = ("", "/manifest.json", "/result.json", "/more", "/more/text.txt")
        assert left == {f"{folder.name}{name}" for name in made}
        if not killed:
            break
    assert not killed
    assert count > 20
    assert "is damaged" not in caplog.text


def test_a_manifest_that_a_kill_left_is_not_part_of_the_result(tmp_path, caplog):
    def fail(folder):
        write_json(folder / "manifest.json", {"files": {}, "seconds": 0, "peak_memory_bytes": 0})
        (folder / "half.txt").write_text("of an earlier attempt")
        (folder / PROGRESS / ".tmpAbC123").write_text("of a writer that was killed")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Cache(tmp_path).run("s", 1, fail)
    folder, _ = Cache(tmp_path).run("s", 1, work_once([]))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "result.txt"]
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"result.txt"}
    assert Cache(tmp_path).run("s", 1, work_once([]))[0] == folder
    assert "is damaged" not in caplog.text


def test_damaged_progress_is_made_again_and_gives_the_same_result(tmp_path, caplog):
    for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:20], lambda b: b""):
        shutil.rmtree(tmp_path)
        steps: list[int] = []

        def fail(folder, steps=steps):
            layered(steps)(folder)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Cache(tmp_path).run("s", 1, fail)
        (path,) = tmp_path.glob(f"*.partial/{PROGRESS}/2.safetensors")
        path.write_bytes(damage(path.read_bytes()))
        folder, _ = Cache(tmp_path).run("s", 1, layered(steps))
        assert json.loads((folder / "result.json").read_text()) == [123]
        assert steps == [0, 1, 2, 2]
        assert "the progress in 2.safetensors is damaged and is dropped" in caplog.text


def test_who_waits_for_another_run_says_so(tmp_path, caplog):
    folder, _ = Cache(tmp_path).run("s", 1, work_once([]))
    lock = FileLock(tmp_path / f"{folder.name}.lock")
    with caplog.at_level(logging.INFO):
        with lock:
            waiting = threading.Thread(
                target=lambda: Cache(tmp_path).run("s", 1, work_once([])), daemon=True
            )
            waiting.start()
            while "waits for another run" not in caplog.text:
                assert waiting.is_alive()
                waiting.join(0.01)
        waiting.join(20)
    assert not waiting.is_alive()
    assert f"s            waits for another run of {folder.name}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        Cache(tmp_path).run("s", 1, work_once([]))
    assert "waits" not in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_stage_that_ends_early_leaves_no_lock_behind(tmp_path, error):
    def fail(folder):
        raise error

    with pytest.raises(error):
        Cache(tmp_path).run("s", 1, fail)
    (path,) = tmp_path.glob("s-*.lock")
    with FileLock(path, timeout=0):
        pass


def test_a_full_disk_ends_a_stage_in_a_sentence_and_keeps_its_progress(tmp_path):
    def fail(folder):
        save_tensors(folder / PROGRESS / "0.safetensors", {"total": torch.ones(1)})
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"No space left on device: .* or set paths\.cache to"):
        Cache(tmp_path).run("s", 1, fail)
    steps: list[int] = []
    Cache(tmp_path).run("s", 1, layered(steps))
    assert steps == [1, 2]


def test_a_cache_below_a_file_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError, match=r"cannot write .*: set paths\.cache to a folder"):
            Cache(Path(root)).run("s", 1, work_once([]))


def test_a_stage_tells_what_it_took_on_the_gpu_and_not_what_others_did(
    tmp_path, monkeypatch, caplog
):
    held = {"most": 7 << 30}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: held.update(most=0))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: held["most"])
    stages = Cache(tmp_path)

    def work(folder):
        held["most"] = 3 << 30
        work_once([])(folder)

    with caplog.at_level(logging.INFO):
        stages.run("s", 1, work)
        stages.run("t", 1, work_once([]))
    assert [r["peak_device_bytes"] for r in stages.as_json()] == [3 << 30, 0]
    assert "on the GPU 3.00" in caplog.text
    again = Cache(tmp_path)
    again.run("s", 1, work)
    manifest = json.loads((again.run("s", 1, work).path / "manifest.json").read_text())
    assert again.reports[0].peak_device_bytes == 3 << 30 == manifest["peak_device_bytes"]
