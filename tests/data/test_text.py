"""Texts play their roles: calibration and evaluation share nothing."""

import pytest
import torch

from spinlab.config import DataConfig
from spinlab.data.text import (
    Text,
    check_length,
    fixed_windows,
    random_windows,
    read_texts,
    tokenize,
)
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer


def roles(calibration: object, *evaluation: object) -> tuple[Text, list[Text]]:
    return read_texts(DataConfig(str(calibration), [str(name) for name in evaluation]))


def both_roles(name: object, held_out: str = "evaluation") -> tuple[Text, Text]:
    calibration, (measured,) = read_texts(DataConfig(str(name), [str(name)], held_out))
    return calibration, measured


def test_calibration_and_evaluation_share_no_article():
    calibration, held_out = (t.text for t in both_roles("wiki"))
    articles = [a for a in held_out.split("\n\n") if len(a) > 300]
    assert len(articles) > 30
    assert not any(article in calibration for article in articles)
    assert "<doc" not in calibration + held_out
    assert 0.02 < len(held_out) / len(calibration) < 0.2


def test_c4_is_held_out_by_characters():
    calibration, held_out = (t.text for t in both_roles("c4"))
    assert len(held_out) == 120_000
    assert held_out[:500] not in calibration


def test_a_file_is_used_whole_where_it_plays_one_role(tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("learn from this")
    test.write_text("0123456789" * 10)
    calibration, (evaluation,) = roles(train, test)
    assert (calibration.text, calibration.part) == ("learn from this", "whole")
    assert (evaluation.text, evaluation.part) == ("0123456789" * 10, "whole")
    assert roles("wiki", test)[1] == [evaluation]


def test_a_file_that_plays_both_roles_is_cut_at_nine_tenths(tmp_path):
    path, copy = tmp_path / "mine.txt", tmp_path / "copy.txt"
    for file in (path, copy):
        file.write_text("0123456789" * 10)
    for other in (path, copy):  # known by content, not by name
        calibration, (evaluation,) = roles(path, other)
        assert (calibration.text, calibration.part) == ("0123456789" * 9, "first 90 %")
        assert (evaluation.text, evaluation.part) == ("0123456789", "last 10 %")


@pytest.mark.parametrize("name", ["wiki", "c4"])
def test_what_choices_are_made_on_is_neither_calibration_nor_reported(name):
    final, reported = both_roles(name)
    calibration, development = both_roles(name, "development")
    assert (development.label, development.part) == (f"{name}_dev", "development split")
    assert (calibration.label, reported.label) == (name, name)
    pieces = [development.text[n : n + 300] for n in range(0, len(development.text) - 300, 3000)]
    assert len(pieces) > 30
    for piece in pieces:
        assert piece not in calibration.text and piece not in reported.text
        assert piece in final.text  # the last run may learn from it
    reports = [reported.text[n : n + 300] for n in range(0, len(reported.text) - 300, 3000)]
    assert not any(piece in calibration.text for piece in reports)
    assert len(development.text) > 100_000


def test_choices_on_a_file_of_both_roles_leave_its_last_tenth_alone(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("0123456789" * 8 + "abcdefghij" + "ABCDEFGHIJ")
    calibration, measured = both_roles(path, "development")
    assert (calibration.text, calibration.part) == ("0123456789" * 8, "first 80 %")
    assert measured == Text("mine.txt_dev", "80 to 90 %", "abcdefghij")
    other = tmp_path / "other.txt"  # brought for choices: whole, and called so
    other.write_text("abc")
    (whole,) = read_texts(DataConfig(str(path), [str(other)], "development"))[1]
    assert whole == Text("other.txt_dev", "whole", "abc")


def test_a_file_is_not_called_as_what_choices_are_made_on(tmp_path):
    path = tmp_path / "wiki_dev"
    path.write_text("abc")
    with pytest.raises(InputError, match="would be called wiki_dev, as one of the named texts"):
        roles("wiki", path)


def test_what_is_held_out_is_one_of_two_parts():
    with pytest.raises(InputError, match=r"data.held_out=test is unknown: choose one of eval"):
        DataConfig(held_out="test")


def test_a_file_is_called_by_its_name_and_never_as_a_named_text(tmp_path):
    for name in ("wiki.txt", "wikitext2.txt", "c4"):
        (tmp_path / name).write_text("my own text")
    _, texts = roles("wiki", "wiki", tmp_path / "wiki.txt", tmp_path / "wikitext2.txt")
    assert [text.label for text in texts] == ["wiki", "wiki.txt", "wikitext2.txt"]
    with pytest.raises(InputError, match="would be called c4, as one of the named texts"):
        roles("wiki", tmp_path / "c4")
    with pytest.raises(InputError, match="would be called c4"):
        roles(tmp_path / "c4", "wiki")


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(folder)
    with pytest.raises(InputError, match="would both be called test"):
        roles("wiki", tmp_path / "a" / "test.txt", tmp_path / "b" / "test.txt")
    again = tmp_path / "a" / ".." / "a" / "test.txt"  # one file, twice
    with pytest.raises(InputError, match="would both be called test"):
        roles("wiki", tmp_path / "a" / "test.txt", again)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("at home")
    assert roles("~/mine.txt", "wiki")[0].text == "at home"


def test_unknown_texts_name_the_known_ones():
    with pytest.raises(InputError, match="wiki, c4, wikitext2"):
        roles("wiki3", "wiki")
    with pytest.raises(InputError, match=r"/no/such.md does not exist"):
        roles("/no/such.md", "wiki")


def test_bytes_are_tokens():
    text = "Hé\n"
    tokenizer = byte_tokenizer()
    ids = tokenize(text, tokenizer)
    assert len(ids) == len(text.encode()) == 4
    assert ids.max() < 256
    assert tokenizer.decode(ids) == text


def test_windows_do_not_overlap_and_drop_the_tail():
    windows = fixed_windows(torch.arange(10), 3, None, "t")
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert fixed_windows(torch.arange(10), 3, 2, "t").shape == (2, 3)


def test_random_windows_are_slices_and_reach_both_ends():
    generator = torch.Generator().manual_seed(0)
    windows = random_windows(torch.arange(12), 4, 500, generator)
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == set(range(9))


def test_too_short_texts_are_named():
    with pytest.raises(InputError, match="'t' has 5 tokens, fewer than one window of 6"):
        fixed_windows(torch.arange(5), 6, None, "t")
    with pytest.raises(InputError, match=r"'t' has 5 tokens.*lower learn.sequence_length"):
        check_length(torch.arange(5), 6, "t", "learn.sequence_length")
