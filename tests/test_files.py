"""Files are on the disk whole or not at all, and what was altered there is found."""

import errno
import json
import logging
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from spinlab.errors import InputError
from spinlab.files import (
    check_writable,
    content_key,
    kept_tensors,
    read_tensors,
    replacing,
    save_tensors,
    write_json,
    writing,
)

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "number": torch.tensor(7),
    "flag": torch.tensor([True]),
    "none": torch.empty(0, 4),
}
ABOUT = {"curve": [{"loss": 1.25}], "text": "größer"}


def same(found: dict[str, torch.Tensor]) -> bool:
    shapes = {name: (t.dtype, t.shape) for name, t in TENSORS.items()}
    return {name: (t.dtype, t.shape) for name, t in found.items()} == shapes and all(
        torch.equal(found[name], tensor) for name, tensor in TENSORS.items()
    )


def test_a_key_does_not_depend_on_the_order_of_settings():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_come_back_with_what_was_said_about_them(tmp_path):
    save_tensors(tmp_path / "t", TENSORS, ABOUT)
    tensors, about = read_tensors(tmp_path / "t")
    assert same(tensors)
    assert about == ABOUT
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in "ab":
        save_tensors(tmp_path / name, TENSORS, ABOUT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_flipped_bit_and_no_torn_file_gives_other_numbers(tmp_path):
    """Some flips are harmless, of one blank of the header into another."""
    path = tmp_path / "t"
    save_tensors(path, TENSORS, ABOUT)
    whole = path.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))
    ]
    torn = [whole[:length] for length in range(0, len(whole), 7)]
    harmless = 0
    for content in (*flipped, *torn, whole + b"\0"):
        path.write_bytes(content)
        try:
            tensors, about = read_tensors(path)
        except ValueError:
            continue
        assert same(tensors)
        assert about == ABOUT
        harmless += 1
    assert harmless < 8


def test_damaged_progress_is_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "t.safetensors"
    assert kept_tensors(path) is None
    save_tensors(path, TENSORS)
    assert same(kept_tensors(path)[0])
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert kept_tensors(path) is None
    assert "the progress in t.safetensors is damaged and is dropped" in caplog.text
    assert not path.exists()


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


def test_tensors_that_do_not_fit_on_the_disk_end_in_a_sentence_and_keep_the_old_ones(tmp_path):
    """A limit of the process on file sizes refuses the write itself, as a full disk does."""
    path = tmp_path / "t"
    save_tensors(path, TENSORS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (
            pytest.raises(InputError, match=r"/t: File too large: free some .* set paths\.cache"),
            writing(tmp_path, "paths.cache"),
        ):
            save_tensors(path, {"large": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(read_tensors(path)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    check_writable(tmp_path / "a" / "b", "paths.runs")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot write .*file.*: set paths\.runs to a folder"):
            check_writable(folder, "paths.runs")
