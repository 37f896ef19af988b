"""The one exception a user sees as a sentence instead of a stack trace."""


class InputError(Exception):
    """Report what a user asked for that cannot be done, with the limit and the fix.

    The command line prints the message and exits with status 2.
    """
