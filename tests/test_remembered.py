"""What tests compose from remembered files is what a fresh process composes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException

from spinlab.compose import composed
from spinlab.config import plain

ROOT = Path(__file__).parent.parent
WORDS = [
    ["+experiment=toy"],
    ["+experiment=toy", "weights=gptq", "seed=3", "eval.tasks=[]"],
    ["+experiment=toy", "weights=gptq", "model=random", "~model.architecture.head_dim"],
    ["+experiment=toy", "model=random", "+model.architecture.rope_theta=5.0", "eval=quick"],
    ["+experiment=paper", "method=quarot", "learn=none"],
    ["+experiment=llama2_7b_w4a4kv4", "method=rtn", "kv.keys.bits=3"],
    ["+method=duquant", "quant.overrides=[{pattern:'*',weights:{bits:8}}]"],
]
FRESH = """
import json, sys
from spinlab.compose import composed
from spinlab.config import plain
print(json.dumps([plain(composed(*words)) for words in json.loads(sys.argv[1])]))
"""


def test_what_is_composed_again_is_what_a_fresh_process_composes():
    """Twice, and around what changed it, or was refused, in between."""
    command = [sys.executable, "-c", FRESH, json.dumps(WORDS)]
    fresh = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    for words in (*WORDS, *reversed(WORDS)):
        found = plain(composed(*words))
        assert json.loads(json.dumps(found)) == fresh[WORDS.index(words)]
        found["model"]["architecture"]["num_hidden_layers"] = 77
        composed(*words).model.architecture["hidden_size"] = 77
        with pytest.raises(HydraException):
            composed(*words, "weights=unheard_of")
        with pytest.raises(HydraException):
            composed(*words, "seed=often")
