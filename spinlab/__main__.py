"""The command line: compose an experiment, run it, turn a user's mistake into one sentence.

python -m spinlab +experiment=smollm2_135m_w4a4kv4
python -m spinlab -m +experiment=toy seed=0,1,2
"""

import difflib
import logging
import os
import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spinlab.config import Config
from spinlab.errors import InputError

_CONF = Path(__file__).parent.parent / "conf"


def _run(composed: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    from spinlab.experiment import run  # torch and transformers load here, not for --help

    run(config, list(HydraConfig.get().overrides.task))


def _schema() -> DictConfig:
    """Return the schema as a node that YAML may merge into.

    omegaconf marks nodes of frozen dataclasses read-only, which would forbid every override.
    """

    def writable(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, False)
        for key in node:
            if OmegaConf.is_dict(child := node._get_node(key)):
                writable(cast(DictConfig, child))

    schema = OmegaConf.structured(Config)
    writable(schema)
    return schema


def _sentence(error: BaseException) -> str:
    """Say a composition error in one sentence, with the nearest experiments for a wrong name."""
    text = " ".join(str(error).split())
    if "Could not find 'experiment/" in text:
        wanted = text.split("'experiment/")[1].split("'")[0]
        known = sorted(path.stem for path in (_CONF / "experiment").glob("*.yaml"))
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.3) or known
        return f"unknown experiment {wanted!r}: did you mean {' or '.join(near)}?"
    if "Could not override 'experiment'" in text:
        return "write +experiment=NAME, with a plus: the experiment is added to the defaults"
    return text


def main() -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    ConfigStore.instance().store(name="schema", node=_schema())
    full_traces = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra would print its own multi-line report and exit with 1: let errors through instead
    os.environ["HYDRA_FULL_ERROR"] = "1"
    command = hydra.main(version_base="1.3", config_path=str(_CONF), config_name="config")(_run)
    try:
        command()
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if full_traces:
            raise
        print(f"spinlab: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
