"""Tensors are on the disk whole or not at all, and what was altered there is found."""

import logging
import resource

import pytest
import torch

from spinlab.errors import InputError
from spinlab.files import writing
from spinlab.tensors import kept_tensors, read_tensors, save_tensors

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
