"""Repeat a record's evaluation on its artefact: python -m spinlab.evaluate FOLDER

Perplexities and accuracies are measured by the code of runs, on the record's texts, windows and
questions. Divergences, flips and differences compare with the original, which an artefact has not:
they are left out. Status 0: all agree; 1: something differs; 2: a mistake, or nothing was compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from spinlab.errors import InputError
from spinlab.launch import repeat_sums
from spinlab.streams import ending, keep_streams

_LEFT_OUT = "left out, as they need the original: KL, flips, and differences of accuracies"


def _run(given: argparse.Namespace) -> int:
    repeat_sums()
    from spinlab.evaluate.again import Again  # torch and transformers load here
    from spinlab.evaluate.verdict import VARIANTS, agree, as_json, shown

    again = Again(given.folder, given.backend, given.device, given.tasks, given.limit, given.texts)
    rows, others = again.measure()
    if given.json:
        print(json.dumps(as_json(rows, others), indent=2))
    else:
        print(shown(rows))
        print(f"\nnot the record's machine: {'; '.join(others)}" if others else "")
        print(_LEFT_OUT)
    agreed = agree(rows)
    if agreed is None:
        raise InputError(
            f"{given.folder}: nothing was compared, as its record has none of these numbers: "
            f"measure {' or '.join(VARIANTS)} in the run (eval.variants), and leave out --limit"
        )
    return 0 if agreed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spinlab.evaluate",
        description="Measure an artefact as its record was, and say whether the numbers agree.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="that export.artefact wrote")
    parser.add_argument("--backend", default="auto", help="as runtime.backend (%(default)s)")
    parser.add_argument("--device", default="auto", help="as runtime.device (%(default)s)")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="more than the record has"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task (the record's)")
    parser.add_argument(
        "--texts", nargs="+", default=[], metavar="FILE", help="files that the record measured"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    given = _parser().parse_args(words)
    with ending("spinlab.evaluate"):
        status = _run(given)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    keep_streams()
    main()
