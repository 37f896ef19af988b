"""Variables that torchrun sets, and those that something else left over."""

import pytest

from spinlab.errors import InputError
from spinlab.launch import is_first, launched, launched_here, local_rank

TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    def set_(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_


def test_what_torchrun_says(environment):
    assert (launched(), launched_here(), local_rank(), is_first()) == (1, 1, 0, True)
    environment(**TORCHRUN)
    assert (launched(), launched_here(), local_rank(), is_first()) == (2, 2, 1, False)


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"]),
        ({"WORLD_SIZE": "4", "RANK": "0"}, ["without LOCAL_RANK"]),
        ({**TORCHRUN, "RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "many"}, ["WORLD_SIZE=many"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK=-1"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE="]),
    ],
    ids=str,
)
def test_variables_that_are_left_over_are_refused(environment, left, named):
    environment(**left)
    with pytest.raises(InputError) as refusal:
        launched()
    assert all(word in str(refusal.value) for word in [*named, "torchrun"])


@pytest.mark.parametrize(("told", "here"), [("0", 1), ("2", 2), ("64", 2)])
def test_a_machine_runs_at_least_this_process_and_at_most_all(environment, told, here):
    environment(LOCAL_WORLD_SIZE=told)
    assert launched_here() == 1
    environment(**{**TORCHRUN, "LOCAL_WORLD_SIZE": told})
    assert launched_here() == here


def test_a_rank_without_a_world_is_the_first(environment):
    """It would be silent for ever."""
    environment(RANK="3")
    assert (launched(), is_first()) == (1, True)
    environment(WORLD_SIZE="1")
    assert (launched(), is_first()) == (1, True)
