import pytest
import torch

from spinlab.data.text import fixed_windows, random_windows, read_text, tokenize
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer


def test_calibration_and_evaluation_share_no_article():
    calibration, held_out = read_text("wiki")
    articles = [a for a in held_out.split("\n\n") if len(a) > 300]
    assert len(articles) > 30
    assert not any(article in calibration for article in articles)
    assert "<doc" not in calibration + held_out
    assert 0.02 < len(held_out) / len(calibration) < 0.2


def test_c4_is_held_out_by_characters():
    calibration, held_out = read_text("c4")
    assert len(held_out) == 120_000
    assert held_out[:500] not in calibration


def test_a_users_text_is_cut_at_nine_tenths(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("0123456789" * 10)
    assert read_text(str(path)) == ("0123456789" * 9, "0123456789")


def test_unknown_texts_name_the_known_ones():
    with pytest.raises(InputError, match="wiki, c4, wikitext2"):
        read_text("wiki3")


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
    windows = random_windows(torch.arange(12), 4, 500, generator, "t")
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == set(range(9))


def test_too_short_texts_are_named():
    with pytest.raises(InputError, match="'t' has 5 tokens, fewer than one window of 6"):
        fixed_windows(torch.arange(5), 6, None, "t")
    with pytest.raises(InputError, match="'t' has 5 tokens"):
        random_windows(torch.arange(5), 6, 1, torch.Generator(), "t")
