"""What the user can put right: shown as one line, never as a traceback."""


class UsageError(Exception):
    """A mistake in the options or the files given."""
