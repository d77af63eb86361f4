"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake that the user can mend.

    The text is one line: the setting or file, its value, the rule, the remedy. The command line prints it without a
    traceback and ends with exit code 2.
    """
