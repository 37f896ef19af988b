"""Two processes that do one thing together, each of them a module of tests run as a command."""

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spinlab import parallel
from tests.forks import Forks


def found_by_two(forks: Forks, module: str, folder: Path) -> list[Any]:
    """Return what each of two processes found in a module that ends with `find_as_one_of_two`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [(str(rank), str(port), str(folder)) for rank in (0, 1)]
    processes = [forks.start(folder, module, *each) for each in words]
    outputs = ["".join(process.communicate()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def find_as_one_of_two(find: Callable[[Path], Any]) -> None:
    """Join the other process and leave what is found in a folder, as the command line says."""
    rank, port, folder = *sys.argv[1:3], Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    parallel.start("cpu")
    gc.collect()
    gc.freeze()  # what there is so far is looked through no more
    torch.save(find(folder), folder / f"{rank}.pt")
    parallel.stop()
