"""What ends a run with a sentence: a mistake of the user's, or a result that cannot be right."""

import difflib
from collections.abc import Sequence


class InputError(Exception):
    """Report what a user asked for that cannot be done, with the limit and the fix.

    The command line prints the message and exits with status 2.
    """


class ResultError(Exception):
    """Report a result that must not be believed: a gate does not hold, a number is none.

    Nothing of it is cached, and the run fails with status 1. Not an assertion, which `python -O`
    would leave out.
    """


def did_you_mean(wanted: str, known: list[str], lists: str = "--cfg job") -> str:
    """Say which of the known names may have been meant, or what lists them."""
    if near := near_names(wanted, known):
        return near
    return f"there are {', '.join(known)}" if len(known) < 40 else f"{lists} lists them all"


def near_names(wanted: str, known: Sequence[str]) -> str:
    """Ask whether known names were meant; empty where none is near."""
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""
