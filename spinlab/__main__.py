"""The command line: compose an experiment, run it, turn a user's mistake into one sentence.

python -m spinlab +experiment=smollm2_135m_w4a4kv4
python -m spinlab -m +experiment=toy seed=0,1,2
torchrun --nproc-per-node=2 -m spinlab +experiment=smollm2_135m_w4a4kv4
"""

import difflib
import logging
import os
import re
import sys
import time
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spinlab.compose import CONF, register
from spinlab.config import Config, plain
from spinlab.errors import InputError

_GRACE = 30  # seconds that torchrun's other processes leave the first one to fail


def _run(composed: DictConfig) -> None:
    level = logging.INFO if _is_first() else logging.ERROR  # a warning holds for all of them
    logging.basicConfig(level=level, format="%(message)s", force=True)
    if not _is_first():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    # bit-equal results whatever the alignment of memory; MKL reads it when torch is imported
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    try:
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        if HydraConfig.get().mode == RunMode.MULTIRUN and _is_one_of_several():
            raise InputError("torchrun runs one experiment: leave out -m, or torchrun")
        from spinlab.experiment import run  # torch and transformers load here, not for --help

        run(config, list(HydraConfig.get().overrides.task))
    except Exception as error:
        # a sweep goes on with its other jobs
        whole = _full_traces() or HydraConfig.get().mode == RunMode.MULTIRUN
        if isinstance(error, InputError) and not whole:
            _fail(error)
        _give_way()
        raise


def _is_first() -> bool:
    """Tell whether this process speaks; asked before torch is there to be asked."""
    return os.environ.get("RANK", "0") == "0"


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _give_way() -> None:
    """Keep a failure to this process until the first one may have told its own.

    What fails in all of them is told by the first: its end makes torchrun end the others. What
    fails in another alone is told by that one, a little later.
    """
    if not _is_first():
        time.sleep(_GRACE)


def _full_traces() -> bool:
    return os.environ.get("SPINLAB_FULL_ERROR") == "1"


def _fail(error: BaseException) -> NoReturn:
    _give_way()
    print(f"spinlab: {_sentence(error)}", file=sys.stderr)
    sys.exit(2)


def _sentence(error: BaseException) -> str:
    """Say an error in one sentence, with the nearest names for a misspelt one."""
    text = " ".join(str(error).split())
    if found := re.search(r"Could not find '(\w+)/([\w/]+)'", text):
        group, wanted = found.groups()
        return f"unknown {group} {wanted!r}: {_nearest(wanted, _options(group))}"
    if "Could not override 'experiment'" in text:
        return "write +experiment=NAME, with a plus: an experiment is added to the defaults"
    if "Could not override 'method'" in text:
        return "write +method=NAME after +experiment=NAME: a method is added to the defaults"
    if "Multiple values for method" in text:
        return "this experiment has a method already: write method=NAME, without a plus"
    if found := re.search(r"Could not override '([\w.]+)'|Key '(\w+)' (?:is )?not in", text):
        wanted = found.group(1) or found.group(2)
        keys = _keys(plain(Config()))
        return f"unknown setting {wanted!r}: {_nearest(wanted, keys)}"
    if error.__cause__ is not None and not isinstance(error, InputError):
        cause = " ".join(str(error.__cause__).split()).partition(" full_key:")[0]
        return f"{text}: {cause}"
    return text


def _options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _keys(tree: dict, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    nested = [_keys(v, f"{prefix}{k}.") for k, v in tree.items() if isinstance(v, dict)]
    return [f"{prefix}{k}" for k in tree] + [name for names in nested for name in names]


def _nearest(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(known)}" if len(known) < 20 else "--cfg job lists them all"


def main() -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    register()
    # Hydra would print its own multi-line report and exit with 1: with its switch for full errors
    # on, they come through to here; what the user asked for is kept under another name
    os.environ.setdefault("SPINLAB_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    command = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_run)
    try:
        command()
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if _full_traces():
            raise
        _fail(error)


if __name__ == "__main__":
    main()
