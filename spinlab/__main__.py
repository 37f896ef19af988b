"""The command line: compose an experiment, run it, turn a user's mistake into one sentence.

spinlab +experiment=smollm2_135m_w4a4kv4            (or python -m spinlab …)
spinlab -m +experiment=toy seed=0,1,2
torchrun --nproc-per-node=2 -m spinlab +experiment=smollm2_135m_w4a4kv4
"""

import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from spinlab.arguments import prepared
from spinlab.collector import resting
from spinlab.compose import CONF, register, settings
from spinlab.errors import InputError
from spinlab.launch import is_first, launched
from spinlab.sentences import sentence
from spinlab.streams import Console, Terminated, end_in_order, keep_streams

_GRACE = 30  # seconds that torchrun's other processes leave the first one to fail
_MISTAKES = (InputError, HydraException, OmegaConfBaseException)


@dataclass
class _Jobs:
    """The runs of this command, of which a sweep has several, and the failures among them."""

    process: int = 0
    started: int = 0
    failures: list[tuple[str, Exception]] = field(default_factory=list)


_jobs = _Jobs()


def _run(composed: DictConfig) -> None:
    """Run one job; keep its failure for the end, so that a sweep goes on with the others."""
    _jobs.started += 1
    _speak()
    sweep = _sweeps()
    words = HydraConfig.get().overrides.task
    job = " ".join([word for word in words if word not in sys.argv] or words)  # what is its own
    if sweep and launched() > 1:
        sys.exit(_fail(InputError("torchrun runs one experiment: leave out -m, or torchrun")))
    try:
        _experiment(composed)
    except Exception as error:
        if sweep:
            _tell(f"{job}: {sentence(error)}", error)
            _let_go(error)
        if os.getpid() != _jobs.process:  # a launcher runs it elsewhere, and waits for word
            raise
        _jobs.failures.append((job, error))


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of a failure hold, networks among them: the next job needs the room."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        if error.__cause__ is not error.__context__:
            _let_go(error.__cause__)
        error = error.__context__


def _sweeps() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _experiment(composed: DictConfig) -> None:
    config = settings(composed)
    with resting():  # torch and transformers load here, not for --help
        from spinlab.experiment import run

    run(config, list(HydraConfig.get().overrides.task), _sweeps())


def _speak() -> None:
    """Set up what a run says before torch and tqdm are imported, which read some of it."""
    level = logging.INFO if is_first() else logging.ERROR  # a warning holds for all of them
    logging.basicConfig(level=level, format="%(message)s", force=True, handlers=[Console()])
    if not is_first():
        os.environ["TQDM_DISABLE"] = "1"
    elif not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # a file needs no moving bar
    # bit-equal results whatever the alignment of memory; MKL reads it when torch is imported
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _tell(text: str, error: BaseException) -> None:
    """Say one line about a failure, below its trace if that is wanted or it is no mistake."""
    wanted = os.environ.get("SPINLAB_FULL_ERROR") == "1"
    if wanted or not isinstance(error, (*_MISTAKES, KeyboardInterrupt)):
        traceback.print_exception(error)
    print(f"spinlab: {text}", file=sys.stderr)


def _fail(error: BaseException) -> int:
    """Tell a failure and return the exit status: 2 for what a user can mend, else 1.

    What fails in all processes is told by the first: its end makes torchrun end the others. What
    fails in another alone is told by that one, a little later.
    """
    if not is_first():
        time.sleep(_GRACE)
    _tell(sentence(error), error)
    return 2 if isinstance(error, _MISTAKES) else 1


def _interrupted(error: KeyboardInterrupt) -> int:
    """Say that a run can go on; return the exit status that shells expect after a signal."""
    if is_first():
        _tell("interrupted: run the same command to go on from the last saved step", error)
    return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)


def _ended() -> int:
    """Sum up the failures and return the exit status."""
    if not _jobs.failures:
        return 0
    errors = [error for _, error in _jobs.failures]
    if _jobs.started == 1:
        return _fail(errors[0])
    told = "; ".join(f"{job}: {sentence(error)}" for job, error in _jobs.failures)
    print(f"spinlab: {len(errors)} of {_jobs.started} failed: {told}", file=sys.stderr)
    return 2 if all(isinstance(error, _MISTAKES) for error in errors) else 1


def _versions() -> str:
    def one(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} (not installed)"

    return ", ".join(map(one, ("spinlab", "torch", "transformers")))


def _command() -> int:
    """Run the command line and return its exit status."""
    global _jobs
    _jobs = _Jobs(os.getpid())
    if "--version" in sys.argv[1:]:
        print(_versions())
        return 0
    # Hydra would print its own multi-line report and exit with 1: with its switch for full errors
    # on, they come through to here; what the user asked for is kept under another name
    os.environ.setdefault("SPINLAB_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        launched()
        register()
        sys.argv[1:] = prepared(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_run)()
        return _ended()
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except _MISTAKES as error:
        return _fail(error)
    except Exception as error:
        if _jobs.started:
            return _fail(error)
        # what Hydra cannot even start is a mistake, whatever it raises
        reason = " ".join(str(error).split())
        return _fail(InputError(reason).with_traceback(error.__traceback__))


def main() -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    keep_streams()
    end_in_order()
    try:
        status = _command()
    finally:
        sys.stdout.flush()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
