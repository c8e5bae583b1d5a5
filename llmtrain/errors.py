"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """Something the user gave is wrong; the command line prints the message as it is, without a traceback, and exits with 1."""
