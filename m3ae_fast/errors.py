"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake in config, data, checkpoint or command line: one line that names the thing and what to do.

    Programs of this package print it without a traceback and exit with code 2.
    """
