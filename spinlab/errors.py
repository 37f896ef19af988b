"""What ends a run with a sentence: a mistake of the user's, or a result that cannot be right."""


class InputError(Exception):
    """Report what a user asked for that cannot be done, with the limit and the fix.

    The command line prints the message and exits with status 2.
    """


class ResultError(Exception):
    """Report a result that must not be believed: a gate does not hold, a number is none.

    Nothing of it is cached, and the run fails with status 1. Not an assertion, which `python -O`
    would leave out.
    """
