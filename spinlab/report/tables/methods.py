"""The table of methods: every method of the field on one model, mean and spread over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spinlab.errors import InputError
from spinlab.report.markdown import markdown, spread
from spinlab.report.records import Record, read_seeds, texts_of

# in the order of the table; a method without records is left out
METHODS = {
    "rtn": "no transform",
    "gptq": "no transform",
    "smoothquant": "SmoothQuant",
    "random": "random orthogonal R1, R2; Hadamard R3, R4",
    "quarot": "random Hadamard (QuaRot)",
    "quarot_own": "QuaRot in its own formats",
    "duquant": "DuQuant as published",
    "duquant_legacy": "DuQuant, the public code's index",
    "duquant_gptq": "DuQuant's transforms",
    "duquant_learned": "DuQuant as start, learned",
    "spinquant_no_had": "SpinQuant no_had",
    "spinquant_had": "SpinQuant had",
    "spinquant_no_had_riemannian": "SpinQuant no_had, Riemannian clip",
    "spinquant_had_riemannian": "SpinQuant had, Riemannian clip",
    "learned_ranges": "Hadamard, learned with W4 and ranges",
    "learned_inputs": "DuQuant as start, all learned with W4",
}


def methods_table(folder: Path) -> str:
    """Return a table with one row per method of a folder of records, after the original's.

    Raises InputError for a method without a title.
    """
    records = read_seeds(folder)
    if unknown := records.keys() - METHODS.keys():
        raise InputError(f"methods without a title in {__name__}: {sorted(unknown)}")
    originals = [run for runs in records.values() for run in runs]
    texts = texts_of(originals[0]["metrics"])
    head = ["method", "transform", "weights", "learned", "seeds", *(f"{t} ppl" for t in texts)]
    rows = [head, ["", "original", "16 bits", "", "", *perplexities(originals, texts, "fp")]]
    for method in METHODS:
        if runs := records.get(method):
            config = runs[0]["config"]
            weights, learned = config["weights"]["method"].upper(), _learned(config)
            cells = [method, METHODS[method], weights, learned, str(len(runs))]
            rows.append([*cells, *perplexities(runs, texts, "fake")])
    return markdown(rows)


def perplexities(runs: Sequence[Record], texts: Sequence[str], variant: str) -> list[str]:
    """Return a variant's perplexity of each text: mean and spread over runs."""
    return [spread([run["metrics"][f"ppl/{text}/{variant}"] for run in runs]) for text in texts]


def _learned(config: Mapping[str, Any]) -> str:
    """Say on how much text rotations were learned."""
    learn = config["learn"]
    if learn["steps"] == 0:
        return ""
    return f"{learn['steps']} x {learn['batch']} x {learn['sequence_length']}"
