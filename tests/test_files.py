"""Files are on the disk whole or not at all, and what cannot be written is told."""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from spinlab.errors import InputError
from spinlab.files import (
    check_writable,
    content_key,
    replacing,
    write_json,
    writing,
)


def test_a_key_does_not_depend_on_the_order_of_settings():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = (f"a.json.tmp-{ended.pid}",)
    others = (f"a.json.tmp-{os.getppid()}", f"b.json.tmp-{ended.pid}", "a.json.tmp-x", "a[x].json")
    for name in (*mine, *others):
        (tmp_path / name).write_text("torn")
    write_json(tmp_path / "a.json", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*others, "a.json"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_refusal_of_the_system_names_the_file_and_the_cure(tmp_path, monkeypatch, number):
    def refuse(path, *arguments, **options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with (
        pytest.raises(InputError) as error,
        writing(tmp_path, "paths.cache"),
    ):
        write_json(tmp_path / "a.json", 1)
    assert f"a.json.tmp-{os.getpid()}: {os.strerror(number)}" in str(error.value)
    assert "set paths.cache to a folder" in str(error.value)
    assert ("free some space" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_that_names_no_file_is_blamed_on_nobody(tmp_path):
    full = partial(OSError, errno.ENOSPC, os.strerror(errno.ENOSPC))
    words = r"or elsewhere, .*: No space left .*: free some space"
    with pytest.raises(InputError, match=words), writing(tmp_path, "paths.cache"):
        raise full()
    for place in (tmp_path / "runs", tmp_path / "cache"):
        place.mkdir()
        words = rf"cannot write {place}/a\.json: No space left .* set paths\.{place.name} to"
        with (
            pytest.raises(InputError, match=words),
            writing(tmp_path / "cache", "paths.cache"),
            writing(tmp_path / "runs", "paths.runs"),
            replacing(place / "a.json") as file,
        ):
            file.write_text("half")
            raise full()


def test_a_refusal_elsewhere_and_other_errors_are_left_as_they_are(tmp_path):
    elsewhere = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model"))
    for error in (elsewhere, FileNotFoundError(errno.ENOENT, "No such file"), OSError("of a hub")):
        with pytest.raises(OSError) as found, writing(tmp_path / "cache", "paths.cache"):
            raise error
        assert found.value is error


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    check_writable(tmp_path / "a" / "b", "paths.runs")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot write .*file.*: set paths\.runs to a folder"):
            check_writable(folder, "paths.runs")
