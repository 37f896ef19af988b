"""The command line: compose an experiment, run it, turn a user's mistake into one sentence.

spinlab +experiment=smollm2_135m_w4a4kv4            (or python -m spinlab …)
spinlab -m +experiment=toy seed=0,1,2
torchrun --nproc-per-node=2 -m spinlab +experiment=smollm2_135m_w4a4kv4
"""

import logging
import math
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from spinlab import sweep
from spinlab.arguments import prepared
from spinlab.collector import resting
from spinlab.compose import CONF, register, settings
from spinlab.config.outputs import metrics_in
from spinlab.errors import InputError
from spinlab.launch import is_first, launched, repeat_sums
from spinlab.report.records import read_record
from spinlab.sentences import sentence
from spinlab.streams import Console, Terminated, end_in_order, keep_streams

log = logging.getLogger(__name__)

_GRACE = 30  # seconds that torchrun's other processes leave the first one to fail
_MISTAKES = (InputError, HydraException, OmegaConfBaseException)


@dataclass
class _Job:
    """The run of this command, where it is one by itself: whether it started, and its failure."""

    started: bool = False
    failure: Exception | None = None


_job = _Job()


def _run(composed: DictConfig) -> float | None:
    """Run one job. Its failure is kept: for the end or, of a point of a sweep, on the disk."""
    _speak()
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        _job.started = True
        try:
            _experiment(composed, list(HydraConfig.get().overrides.task))
        except Exception as error:
            _job.failure = error
        return None
    if launched() > 1:
        sys.exit(_fail(InputError("torchrun runs one experiment: leave out -m, or torchrun")))
    return _point(composed)


def _point(composed: DictConfig) -> float:
    """Run a point of a sweep unless it is finished; return its metric for a search."""
    told, place = HydraConfig.get(), Path(HydraConfig.get().sweep.dir)
    point = sweep.Point(told.job.num, sweep.own_words(told.overrides.task))
    point.save(place)
    try:
        metrics = metrics_in(composed.sweep.metric)
        _prepare(told, metrics)
        point.state, point.record, found = _finished_or_run(composed, point.words)
        return found.get(metrics[0], math.nan) if metrics else math.nan
    except Exception as error:
        point.state, point.error = "failed", sentence(error)
        point.mistake = isinstance(error, _MISTAKES)
        own = [word for word in point.words if word not in sys.argv] or point.words
        _tell(f"{' '.join(own)}: {point.error}", error)
        _let_go(error)
        return math.nan
    except BaseException:
        point.state, point.error = "interrupted", "the same command goes on with it"
        raise
    finally:
        point.save(place)


def _prepare(told: HydraConf, metrics: list[str]) -> None:
    """See that a search has something to optimise, and give a worker its own GPU."""
    searches = not told.sweeper["_target_"].endswith("BasicSweeper")
    if searches and (len(metrics) != 1 or set("*?[") & set(metrics[0])):
        raise InputError(
            f"a search optimises one metric, and {', '.join(metrics) or 'none'} is given: name it, "
            "as in sweep.metric=ppl/wiki/fake"
        )
    if "joblib" in told.launcher["_target_"]:
        from spinlab.device import own_one  # torch loads here

        own_one(sweep.points_of(Path(told.sweep.dir)))


def _finished_or_run(composed: DictConfig, words: list[str]) -> tuple[str, str, dict[str, float]]:
    """Return how a point came by its record, where that is, and its metrics."""
    config = settings(composed)
    from spinlab.experiment import finished, run  # torch and transformers load here

    if found := finished(config, words):
        log.info("%-12s cached %s", "point", found)
        return "cached", str(found), read_record(found)["metrics"]
    record = run(config, words, sweep=True)
    return "done", str(record.path), record.metrics


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of a failure hold, networks among them: the next job needs the room."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        if error.__cause__ is not error.__context__:
            _let_go(error.__cause__)
        error = error.__context__


def _experiment(composed: DictConfig, words: list[str]) -> None:
    config = settings(composed)
    with resting():  # torch and transformers load here, not for --help
        from spinlab.experiment import run

    run(config, words)


def _speak() -> None:
    """Set up what a run says before torch and tqdm are imported, which read some of it."""
    level = logging.INFO if is_first() else logging.ERROR  # a warning holds for all of them
    logging.basicConfig(level=level, format="%(message)s", force=True, handlers=[Console()])
    if not is_first():
        os.environ["TQDM_DISABLE"] = "1"
    elif not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # a file needs no moving bar
    repeat_sums()


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
    """Tell what failed and return the exit status."""
    if _job.failure is not None:
        return _fail(_job.failure)
    if not sweep.started:
        return 0
    points = sweep.started.end()
    if not points:
        told = "the states of all points are gone: run it again, which goes on with what is done"
        print(f"spinlab: {sweep.started.folder}: {told}", file=sys.stderr)
        return 1
    return _of_points(points)


def _of_points(points: list[sweep.Point]) -> int:
    """Tell which points of a sweep failed and return the exit status."""
    failed = [(p, label) for p, label in zip(points, sweep.labels(points), strict=True) if p.failed]
    if not failed:
        return 0
    alike: dict[str | None, list[str]] = {}  # what is wrong with many points is told once
    for point, label in failed:
        alike.setdefault(point.error, []).append(label)
    told = "; ".join(f"{', '.join(labels)}: {error}" for error, labels in alike.items())
    print(f"spinlab: {len(failed)} of {len(points)} failed: {told}", file=sys.stderr)
    return 2 if all(point.mistake for point, _ in failed) else 1


def _versions() -> str:
    def one(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} (not installed)"

    return ", ".join(map(one, ("spinlab", "torch", "transformers")))


def _command() -> int:
    """Run the command line and return its exit status."""
    global _job
    _job, sweep.started = _Job(), None
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
        if sweep.started:
            sweep.started.end()
        return _interrupted(interrupt)
    except _MISTAKES as error:
        return _fail(error)
    except Exception as error:
        if _job.started or (sweep.started and _of_points(sweep.started.end())):
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
