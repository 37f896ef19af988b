"""Signs of life from long stages."""

import logging
import time
from collections.abc import Callable

import pytest

import spinlab.heartbeat as module
from spinlab.cache import Cache
from spinlab.heartbeat import heartbeat


def until(true: Callable[[], object]) -> None:
    """Wait for what another thread does, which on a busy machine comes late."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def speaking():
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


def test_a_long_stage_says_that_it_is_at_work(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL", 0.02)

    def beats() -> list[str]:
        return [line for line in caplog.messages if "making the rotations" in line]

    with caplog.at_level(logging.INFO):
        Cache(tmp_path).run("rotate", 1, lambda folder: until(lambda: len(beats()) >= 2))
    assert beats()[0].startswith("rotate       making the rotations, comparing")
    before = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == before  # it ends with the stage


def test_a_stage_of_a_variant_says_what_its_kind_does(caplog, monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL", 0.01)
    with caplog.at_level(logging.INFO), heartbeat("handoff-fake"):
        until(lambda: caplog.messages)
    assert caplog.messages[0].startswith("handoff-fake comparing the integer network with floats")


def test_a_bar_is_sign_enough(caplog, monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL", 0.01)
    with caplog.at_level(logging.INFO), heartbeat("learn"):
        bar = module.tqdm(total=3, file=open("/dev/null", "w"))  # noqa: SIM115
        time.sleep(0.1)
        assert not caplog.messages
        bar.close()
        bar.fp.close()
        until(lambda: caplog.messages)
        assert "learn" in caplog.messages[0]
