"""Folders in use: nobody who asks clears them away, and a hold ends with its process."""

import shutil
import threading

from spinlab.held import Hold, is_held, unused


def test_a_folder_is_held_as_long_as_anyone_holds_it(tmp_path):
    folder = tmp_path / "a" / "b"
    assert not is_held(folder)
    one, other = Hold(folder), Hold(folder)
    one.release()
    with unused(folder) as free:
        assert not free
    assert is_held(folder)
    other.release()
    assert not is_held(folder)
    with unused(folder) as free:
        assert free


def test_a_forgotten_hold_ends(tmp_path):
    Hold(tmp_path)
    assert not is_held(tmp_path)


def test_who_waits_while_a_folder_is_cleared_away_holds_the_next_one(tmp_path):
    folder, holds = tmp_path / "a", []
    folder.mkdir()
    with unused(folder) as free:
        assert free
        waiting = threading.Thread(target=lambda: holds.append(Hold(folder)), daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert not holds
        shutil.rmtree(folder)
    waiting.join(10)
    assert holds and is_held(folder)
